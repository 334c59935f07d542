// Schemas of every compiled op, and the empty Python module whose import registers them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastkd, m) {
  m.def(
      "kl_div(Tensor student, Tensor teacher, Tensor? row_temperature, float temperature, int divergence, float beta, "
      "Tensor? valid, Tensor? labels, float cross_entropy_weight, int reduction, Tensor? denominator, "
      "bool scale_by_temperature, bool need_grad, bool need_stats) -> (Tensor loss, Tensor grad, Tensor stats)");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal) -> "
      "(Tensor output, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal, "
      "Tensor lse) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "attention_kl_div(Tensor student_query, Tensor student_key, Tensor teacher_query, Tensor teacher_key, "
      "Tensor? student_bias, Tensor? teacher_bias, Tensor? student_lse, Tensor? teacher_lse, Tensor? query_mask, "
      "Tensor? key_mask, float student_scale, float teacher_scale, bool causal, int window, Tensor? row_weight) -> "
      "(Tensor loss, Tensor grad_query, Tensor grad_key)");
  m.def(
      "kl_div_(Tensor(a!) student, Tensor teacher, Tensor? row_temperature, float temperature, int divergence, "
      "float beta, Tensor? valid, Tensor? labels, float cross_entropy_weight, int reduction, Tensor? denominator, "
      "bool scale_by_temperature, bool need_stats) -> (Tensor loss, Tensor stats)");
  m.def(
      "topk_kl_div(Tensor student, Tensor ids, Tensor teacher, Tensor? row_temperature, float temperature, "
      "int divergence, float beta, Tensor? valid, Tensor? row_weight, int reduction, Tensor? denominator, "
      "bool scale_by_temperature, bool need_grad) -> (Tensor loss, Tensor grad)");
  m.def(
      "topk_kl_div_(Tensor(a!) student, Tensor ids, Tensor teacher, Tensor? row_temperature, float temperature, "
      "int divergence, float beta, Tensor? valid, Tensor? row_weight, int reduction, Tensor? denominator, "
      "bool scale_by_temperature) -> Tensor");
  m.def("lstm_steps(Tensor gates, Tensor lengths, Tensor weight) -> Tensor");
  m.def(
      "lstm_forward(Tensor gates, Tensor lengths, Tensor weight) -> (Tensor states, Tensor cells, Tensor activations)");
  m.def("lstm_backward(Tensor grad, Tensor lengths, Tensor weight, Tensor cells, Tensor activations) -> Tensor");
  m.def("mixup(Tensor x, Tensor permutation, Tensor lam, bool transpose) -> Tensor");
  m.def("embedding_mixup(Tensor ids, Tensor table, Tensor permutation, Tensor lam, int padding_idx) -> Tensor");
  m.def(
      "embedding_mixup_backward(Tensor grad, Tensor ids, Tensor permutation, Tensor lam, SymInt vocabulary, "
      "int padding_idx) -> Tensor");
  m.def(
      "low_rank_mse(Tensor x, Tensor down, Tensor up, Tensor target, Tensor? bias, Tensor? valid, Tensor? weights, "
      "Tensor? output, Tensor? grad_output, int reduction, Tensor? denominator, bool need_x, bool need_down, "
      "bool need_up, bool need_bias, bool need_output) -> (Tensor loss, Tensor grad_x, Tensor grad_down, "
      "Tensor grad_up, Tensor grad_bias, Tensor projection)");
  m.def(
      "mse(Tensor[] students, Tensor[] teachers, Tensor? valid, Tensor weights, Tensor denominators, "
      "bool[] need_grad) -> (Tensor total, Tensor parts, Tensor[] grads)");
  m.def("bilstm(Tensor x, Tensor lengths, Tensor weight_input, Tensor weight_recurrent, Tensor bias) -> Tensor");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef_Slot slots[] = {{0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&module);
}
