"""The document of ablations.py: its tables and plots, from the JSON of every run."""

import json
import statistics
from pathlib import Path

import ablations_rows as rows
from ablations_rows import MEASURES, Run, finished

from runtime.cli import need

BEGIN, END = "<!-- written by bench/ablations.py -->", "<!-- end -->"
Done = dict[Run, dict]  # the JSONs of finished runs


def summary(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; a single value as it is."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{spread}"


def figures(row: str, epochs: int, done: Done) -> dict[int, dict[str, float]]:
    """Figures by seed. The untrained encoder's, with 0 epochs, are given for any number of epochs."""
    return {run.seed: x["figures"] for run, x in done.items() if run.row == row and run.epochs in (epochs, 0)}


def rate(row: str, epochs: int, done: Done) -> str:
    run = next(run for run in done if run.row == row and run.epochs in (epochs, 0))
    return f"{run.lr:g}" + f" x K / {run.lr_k:g}" * bool(run.lr_k) if run.epochs else ""


def differences(row: str, epochs: int, measure: str, done: Done) -> list[float]:
    """Differences to full R2O with the same seed and epochs."""
    ours, full = figures(row, epochs, done), figures("r2o", epochs, done)
    return [ours[seed][measure] - full[seed][measure] for seed in sorted(ours.keys() & full.keys())]


def table(title: str, epochs: int, paper: dict[str, str], done: Done) -> list[str]:
    """Markdown of figures, then of paired differences, for rows that have any. paper: the paper's figures, by row."""
    theirs = ["paper"] * any(paper.values())
    head = ["", *theirs, "lr", "seeds", *MEASURES.values()]
    lines = [f"## {title}, {epochs} epochs", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    compared = [row for row in paper if row != "r2o"]
    for row, minus in [(row, "") for row in paper] + [(row, " − R2O") for row in compared]:
        by_seed, seeds = figures(row, epochs, done), 1 if row in rows.ONCE else len(rows.SEEDS[epochs])
        found = len(differences(row, epochs, "k-NN", done)) if minus else len(by_seed)
        if not found:
            continue
        cells = [rows.ROWS[row].title + minus, *["" if minus else paper[row] for _ in theirs]]
        cells.append("" if minus else rate(row, epochs, done))
        cells.append(f"{seeds}" if found == seeds else f"**{found} of {seeds}**")
        for measure in MEASURES:
            values = [by_seed[seed][measure] for seed in sorted(by_seed)]
            values = differences(row, epochs, measure, done) if minus else values
            cells.append(summary(values, 2 if MEASURES[measure].endswith("%") else 3, "+" if minus else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def sweep_table(swept: Done) -> list[str]:
    runs, columns = rows.sweep_runs(), rows.SWEPT.values()
    names = [f"{rows.ROWS[row].title}, --lr-k {lr_k:g}" for row, lr_k in columns]
    lines = [f"## The sweep: k-NN top-1 on images held out, %, {rows.SWEEP} epochs", ""]
    lines += [f"| --lr | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    for lr in rows.RATES:
        found = [swept.get(run) for run in runs if run.lr == lr]  # in the order of the columns
        cells = [f"{x['figures']['k-NN']:.2f}" if x else "**not run**" for x in found]
        lines.append(f"| {lr:g} | {' | '.join(cells)} |")
    chosen = [f"`--lr {lr:g} --lr-k {lr_k:g}` ({kind})" for kind, (lr, lr_k) in rows.choose(swept).items()]
    lines += ["", f"Chosen: {', '.join(chosen)}."] if chosen else []
    return [*lines, ""]


def plot(epochs: int, names: list[str], done: Done, path: Path):
    """Paired differences to full R2O in four measures: a dot per seed, a bar at their mean."""
    from matplotlib.figure import Figure

    shown = ("k-NN", "fine-tuned", "foreground", "pixel 4")
    figure = Figure(figsize=(12, 0.9 + 0.27 * len(names)), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for y, row in enumerate(names):
            values = differences(row, epochs, measure, done)
            axes.plot(values, [y] * len(values), "o", color="C0", markersize=4, alpha=0.7)
            if values:
                axes.plot(statistics.fmean(values), y, "|", color="black", markersize=12)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(names)), [rows.ROWS[row].title for row in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"{MEASURES[measure]}, minus R2O's", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(labelsize=8)
    figure.savefig(path, format="png", dpi=90)


def plot_rates(epochs: int, done: Done, path: Path):
    """k-NN against foreground IoU and against fine-tuning, of every row, means over the seeds that all have; a line
    joins a method's rates."""
    from matplotlib.figure import Figure

    each = {row: found for row in rows.ROWS if 0 in (found := figures(row, epochs, done))}
    seeds = [seed for seed in rows.SEEDS[epochs] if all(seed in found for found in each.values())]
    means = {row: {m: statistics.fmean(x[s][m] for s in seeds) for m in MEASURES} for row, x in each.items()}
    rated = {"untrained"}.union(*rows.RATED.values())
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"{epochs} epochs; seeds: {', '.join(map(str, seeds))}; at the markers: --lr", fontsize=9)
    for axes, measure in zip(figure.subplots(1, 2), ("foreground", "fine-tuned"), strict=True):
        at = {row: (x["k-NN"], x[measure]) for row, x in means.items()}
        others = [point for row, point in at.items() if row not in rated]
        axes.plot([x for x, _ in others], [y for _, y in others], "o", color="gray", markersize=4, label="other rows")
        for marker, (name, same) in zip("osD^", rows.RATED.items(), strict=True):
            found = sorted((float(rate(row, epochs, done)), *at[row]) for row in same if row in at)
            if found:
                axes.plot(*[[x[i] for x in found] for i in (1, 2)], f"{marker}-", label=rows.ROWS[name].title)
            for lr, x, y in found:
                axes.annotate(f"{lr:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        if "untrained" in at:
            axes.plot(*at["untrained"], "x", color="black", label="untrained")
        axes.set_xlabel(MEASURES["k-NN"])
        axes.set_ylabel(MEASURES[measure])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=90)


def footer(done: Done, swept: Done, runs: int) -> list[str]:
    """The priors' own overlaps; how much has run, on what."""
    priors = next((x["figures"] for run, x in done.items() if run.row == "untrained"), None)
    overlaps = f"SLIC {priors['SLIC prior']:.3f}, grid {priors['grid']:.3f}" if priors else "not run"
    lines = [f"Best overlap of the priors themselves: {overlaps}."]
    about = sorted({f"{x['hardware']}, torch {x['versions']['torch']}" for x in (done | swept).values()})
    said = f"{len(done)} of {runs} runs after the sweep are finished"
    return [*lines, f"{said}; hardware: {'; '.join(about) or 'none yet'}."]


def write(results: Path, doc: Path):
    """Write the tables between the two marks of the document, and the plots beside it."""
    need((results / "data.json").exists(), f"no results in {results}: pass --data and --photos to make them")
    data = json.loads((results / "data.json").read_text())
    swept = finished(rows.sweep_runs(), results, data)
    runs = rows.programme(rows.choose(swept))
    done = finished(runs, results, data)
    lines = sweep_table(swept)
    longer = dict.fromkeys(rows.LONGER, "")
    tables = [(title, rows.SHORT, paper) for title, paper in rows.TABLES.items()] + [("Longer", rows.LONG, longer)]
    for title, epochs, paper in tables:
        shown = [run.row for run in done if run.row in paper and run.epochs == epochs]
        if shown and (shown != ["r2o"] or epochs == rows.LONG):
            lines += table(title, epochs, paper, done)
    for epochs, names in ((rows.SHORT, [*rows.ROWS][2:]), (rows.LONG, [x for x in rows.LONGER if x != "r2o"])):
        path = doc.with_name(f"{doc.stem}-{epochs}.png")
        if shown := [row for row in names if differences(row, epochs, "k-NN", done)]:
            plot(epochs, shown, done, path)
            lines += [f"![Paired differences to R2O after {epochs} epochs, a dot per seed]({path.name})", ""]
    path = doc.with_name(f"{doc.stem}-rates.png")
    plot_rates(rows.SHORT, done, path)
    lines += [f"![k-NN, foreground IoU and fine-tuning after {rows.SHORT} epochs, by method and --lr]({path.name})", ""]
    lines += footer(done, swept, len(runs))
    insert(doc, BEGIN, lines)


def insert(doc: Path, begin: str, lines: list[str]):
    """Put lines between the mark `begin` and the next END of the document; a new document has only these."""
    before, found, rest = (doc.read_text() if doc.exists() else f"# Ablations\n\n{begin}\n{END}\n").partition(begin)
    _, end, after = rest.partition(END)
    need(found and end, f"{doc} lacks the lines {begin} and {END}: put them where the tables belong")
    doc.write_text("\n".join([before + begin, "", *lines, "", END]) + after)
