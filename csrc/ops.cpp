// Op schemas. The `_ref` in r2o_ops.py defines what an op computes; cpu/<op>.cpp and cuda/<op>.cu implement and register
// it for their device. The autograd and fake registrations are in r2o_ops.py.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "common.h"

TORCH_LIBRARY(r2o, m) {
  m.def("region_pool(Tensor features, Tensor regions, int num_regions) -> (Tensor embeddings, Tensor area)");
  m.def("kmeans(Tensor points, Tensor valid, Tensor uniforms, int max_iters) -> (Tensor centers, Tensor assignment)");
  m.def("crop_masks(Tensor masks, Tensor boxes, Tensor flips, int num_clusters, int size) -> Tensor");
  m.def("mask_pool(Tensor features, Tensor weights, Tensor pairs) -> Tensor");
  m.def("mask_pool_backward(Tensor grad, Tensor weights, Tensor pairs) -> Tensor");
}

PYBIND11_MODULE(r2o_C, m) {
  m.doc() = "The compiled ops of r2o_ops.py, registered as torch.ops.r2o.*. The attributes describe the build.";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("max_points_cuda") = r2o::kMaxPoints;
  m.attr("gram_bytes_cuda") = r2o::kGramBytes;
#ifdef R2O_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
