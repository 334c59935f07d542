// Schemas of every compiled op, and the empty Python module whose import registers them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastkd, m) {
  m.def(
      "kl_div(Tensor student, Tensor teacher, Tensor? row_temperature, float temperature, int divergence, float beta, "
      "Tensor? valid, Tensor? labels, float cross_entropy_weight, int reduction, Tensor? denominator, "
      "bool scale_by_temperature, bool need_grad, bool need_stats) -> (Tensor loss, Tensor grad, Tensor stats)");
  m.def(
      "kl_div_(Tensor(a!) student, Tensor teacher, Tensor? row_temperature, float temperature, int divergence, "
      "float beta, Tensor? valid, Tensor? labels, float cross_entropy_weight, int reduction, Tensor? denominator, "
      "bool scale_by_temperature, bool need_stats) -> (Tensor loss, Tensor stats)");
  m.def("prefer_huge_pages_(Tensor(a!) memory) -> ()");
  m.def("mixup(Tensor x, Tensor permutation, Tensor lam, bool transpose) -> Tensor");
  m.def("embedding_mixup(Tensor ids, Tensor table, Tensor permutation, Tensor lam, int padding_idx) -> Tensor");
  m.def(
      "embedding_mixup_backward(Tensor grad, Tensor ids, Tensor permutation, Tensor lam, SymInt vocabulary, "
      "int padding_idx) -> Tensor");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef_Slot slots[] = {{0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
