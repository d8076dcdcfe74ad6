"""The paper's evaluations and transfers, as programs: python -m evals.knn, torchrun … -m evals.segment."""

import runtime  # noqa: F401  (says what is not installed)
