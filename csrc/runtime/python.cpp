// fastkd._runtime: the student and a layer alone for Python, by numpy arrays in and out, with the GIL released while
// they work.
#include <pybind11/stl.h>

#include <memory>

#include "runtime/python_arguments.h"
#include "simd/dispatch.h"

namespace fastkd::runtime {
namespace {

Pooling pooling_of(const std::string& name) {
  if (name == "max") return Pooling::max;
  if (name == "min") return Pooling::min;
  if (name == "mean") return Pooling::mean;
  if (name == "attention") return Pooling::attention;
  throw std::invalid_argument("pooling must name some of max, min, mean and attention, got " + name);
}

class Model {
 public:
  Model(const py::dict& arrays, const std::string& precision, const py::dict& sizes,
        const std::vector<std::string>& pooling, const std::map<std::string, int64_t>& tasks, int threads)
      : workers_(std::make_unique<Workers>(check_threads(threads))) {
    const auto size_of = [&](const char* name) { return check_size(name, sizes[name]); };
    const int64_t hidden = size_of("hidden"), width = 2 * hidden, head = size_of("head");
    student_.precision = precision_of(precision);
    const Precision dense = student_.precision == Precision::int8 ? Precision::int8 : Precision::float32;
    Weights weights(arrays, student_.precision);
    student_.words = weights.words(size_of("words"), size_of("projection"));
    student_.encoder = weights.bilstm("encoder.", hidden, student_.words.size);
    for (const std::string& name : pooling) student_.pooling.push_back(pooling_of(name));
    const bool attention = std::count(student_.pooling.begin(), student_.pooling.end(), Pooling::attention) > 0;
    const int64_t sides = size_of("sides");
    if (sides > 2) throw std::invalid_argument("sides must be 1 or 2, got " + std::to_string(sides));
    for (int64_t i = 0; i < sides; ++i) {
      const std::string number = std::to_string(i);
      Side side;
      side.integrator = weights.bilstm("integrators." + number + ".", hidden, 3 * width);
      side.scorer.assign((width + 15) / 16 * 16, 0.0f);
      if (attention) std::copy_n(weights.vector("scorers." + number, width), width, side.scorer.begin());
      student_.sides.push_back(std::move(side));
    }
    const int64_t features = 2 * (int64_t)student_.pooling.size() * width;
    for (const auto& [task, outputs] : tasks) {
      const std::string prefix = "heads." + task + ".";
      if (outputs < 1 || outputs > 1 << 20)
        throw std::invalid_argument("task " + task + " must have from 1 to 1048576 outputs");
      student_.heads[task] = {pack_linear(weights.matrix(prefix + "hidden", head, features),
                                          weights.vector(prefix + "hidden.bias", head), dense),
                              pack_linear(weights.matrix(prefix + "output", outputs, head),
                                          weights.vector(prefix + "output.bias", outputs), dense),
                              outputs};
    }
  }

  py::array_t<float> logits(const std::string& task, const py::array_t<int32_t, py::array::c_style>& ids,
                            const py::array_t<int64_t, py::array::c_style>& lengths, bool pairs) {
    const auto head = student_.heads.find(task);
    if (head == student_.heads.end()) throw std::invalid_argument("the student has no task " + task);
    Question question{ids.data(), check_lengths(lengths, ids.size(), "ids"), pairs};
    check(question, ids.size());
    py::array_t<float> logits({question.rows(), head->second.outputs});
    float* to = logits.mutable_data();
    {
      py::gil_scoped_release release;
      answer(student_, head->second, question, to, *workers_);
    }
    return logits;
  }

 private:
  void check(const Question& question, int64_t tokens) const {
    if (question.pairs && question.lengths.size() % 2)
      throw std::invalid_argument("pairs need an even number of sentences");
    for (int64_t i = 0; i < tokens; ++i)
      if (question.ids[i] < 0 || question.ids[i] >= student_.words.count)
        throw std::invalid_argument("ids must be from 0 to " + std::to_string(student_.words.count - 1) + ", got " +
                                    std::to_string(question.ids[i]));
  }

  Student student_;
  std::unique_ptr<Workers> workers_;
};

class Lstm {
 public:
  Lstm(const py::dict& arrays, const std::string& precision, int64_t inputs, int64_t hidden, int threads)
      : inputs_(check_size("inputs", py::int_(inputs))),
        width_(2 * check_size("hidden", py::int_(hidden))),
        layer_(Weights(arrays, precision_of(precision)).bilstm("", hidden, inputs)),
        workers_(std::make_unique<Workers>(check_threads(threads))) {}

  py::array_t<float> call(const py::array_t<float, py::array::c_style>& x,
                          const py::array_t<int64_t, py::array::c_style>& lengths) {
    if (x.ndim() != 2 || x.shape(1) != inputs_)
      throw std::invalid_argument("x must be (tokens, " + std::to_string(inputs_) + "), got shape " +
                                  py::cast<std::string>(py::str(x.attr("shape"))));
    const std::vector<int64_t> of_sequences = check_lengths(lengths, x.shape(0), "rows of x");
    py::array_t<float> y({x.shape(0), (py::ssize_t)width_});
    Inputs rows;
    rows.values = x.data();
    rows.stride = inputs_;
    float* to = y.mutable_data();
    const int64_t size = x.size();
    {
      py::gil_scoped_release release;
      if (!all_finite(rows.values, size)) throw std::invalid_argument("x holds NaN or infinity");
      run_lstm({&layer_[0], &layer_[1]}, rows, of_sequences, to, width_, *workers_);
    }
    return y;
  }

 private:
  // By the exponent's bits, as a sum of integers is what the compiler does in vectors.
  static bool all_finite(const float* x, int64_t n) {
    constexpr uint32_t kExponent = 0x7f800000;
    uint32_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      found |= (uint32_t)((bits & kExponent) == kExponent);
    }
    return found == 0;
  }

  const int64_t inputs_, width_;
  const std::vector<Direction> layer_;
  std::unique_ptr<Workers> workers_;
};

}  // namespace
}  // namespace fastkd::runtime

PYBIND11_MODULE(_runtime, m) {
  namespace py = pybind11;
  using fastkd::runtime::Lstm;
  using fastkd::runtime::Model;
  py::class_<Model>(m, "Model")
      .def(py::init<const py::dict&, const std::string&, const py::dict&, const std::vector<std::string>&,
                    const std::map<std::string, int64_t>&, int>(),
           py::arg("arrays"), py::arg("precision"), py::arg("sizes"), py::arg("pooling"), py::arg("tasks"),
           py::arg("threads"))
      .def("logits", &Model::logits, py::arg("task"), py::arg("ids"), py::arg("lengths"), py::arg("pairs"));
  py::class_<Lstm>(m, "Lstm")
      .def(py::init<const py::dict&, const std::string&, int64_t, int64_t, int>(), py::arg("arrays"),
           py::arg("precision"), py::arg("inputs"), py::arg("hidden"), py::arg("threads"))
      .def("__call__", &Lstm::call, py::arg("x"), py::arg("lengths"));
  m.def("cpu", [] {
    using fastkd::Target;
    const Target t = fastkd::target();
    const std::string name = t == Target::avx512 ? "AVX512" : t == Target::avx2 ? "AVX2" : "baseline";
    return fastkd::has_vnni() ? name + " VNNI" : name;
  });
}
