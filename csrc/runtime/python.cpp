// fastkd._runtime: the student for Python, by numpy arrays in and out, with the GIL released while it works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <stdexcept>

#include "runtime/cpu.h"
#include "runtime/student.h"
#include "simd/dispatch.h"

namespace py = pybind11;

namespace fastkd::runtime {
namespace {

Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::float32;
  if (name == "bfloat16") return Precision::bfloat16;
  if (name == "int8") return Precision::int8;
  throw std::invalid_argument("precision must be float32, bfloat16 or int8, got " + name);
}

Pooling pooling_of(const std::string& name) {
  if (name == "max") return Pooling::max;
  if (name == "min") return Pooling::min;
  if (name == "mean") return Pooling::mean;
  if (name == "attention") return Pooling::attention;
  throw std::invalid_argument("pooling must name some of max, min, mean and attention, got " + name);
}

// The arrays of a model by name, of which each is used once and must have the shape and type that its place asks for.
class Weights {
 public:
  Weights(const py::dict& arrays, Precision precision) : arrays_(arrays), precision_(precision) {}

  template <class T>
  const T* take(const std::string& name, const std::vector<int64_t>& shape) {
    if (!arrays_.contains(name)) throw std::invalid_argument("the model has no tensor " + name);
    const py::array array = py::cast<py::array>(arrays_[name.c_str()]);
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) ||
        std::vector<int64_t>(array.shape(), array.shape() + array.ndim()) != shape)
      throw std::invalid_argument("tensor " + name + " must be " + py::cast<std::string>(py::str(py::dtype::of<T>())) +
                                  " of shape " + py::cast<std::string>(py::str(py::tuple(py::cast(shape)))) + ", got " +
                                  py::cast<std::string>(py::str(array.dtype())) + " of shape " +
                                  py::cast<std::string>(py::str(array.attr("shape"))));
    return (const T*)array.data();
  }

  Matrix matrix(const std::string& name, int64_t outputs, int64_t inputs) {
    Matrix m;
    m.outputs = outputs;
    m.inputs = inputs;
    if (precision_ == Precision::int8) {
      m.bytes = take<int8_t>(name, {outputs, inputs});
      m.scale = take<float>(name + ".scale", {outputs});
    } else {
      m.values = take<float>(name, {outputs, inputs});
    }
    return m;
  }

  const float* vector(const std::string& name, int64_t n) { return take<float>(name, {n}); }

  std::vector<Direction> bilstm(const std::string& name, int64_t hidden, int64_t inputs) {
    std::vector<Direction> directions;
    for (const bool backward : {false, true}) {
      const std::string prefix = name + (backward ? ".backward." : ".forward.");
      const Matrix input = matrix(prefix + "input", 4 * hidden, inputs);
      const Matrix recurrent = matrix(prefix + "recurrent", 4 * hidden, hidden);
      directions.push_back(make_direction(input, recurrent, vector(prefix + "bias", 4 * hidden), precision_, backward));
    }
    return directions;
  }

  Words words(int64_t count, int64_t size) {
    Words w;
    w.count = count;
    w.size = size;
    if (precision_ == Precision::int8) {
      const int64_t stride = (size + 3) / 4 * 4;
      const uint8_t* rows = take<uint8_t>("words", {count, size});
      const float* scale = vector("words.scale", count);
      w.scale.assign(scale, scale + count);
      w.rows = Memory(count * stride);
      std::memset(w.rows.as(), 128, count * stride);
      for (int64_t i = 0; i < count; ++i) std::memcpy(w.rows.as() + i * stride, rows + i * size, size);
    } else {
      w.rows = Memory(count * size * (int64_t)sizeof(float));
      std::memcpy(w.rows.as(), take<float>("words", {count, size}), count * size * sizeof(float));
    }
    return w;
  }

 private:
  const py::dict& arrays_;
  const Precision precision_;
};

int64_t size_of(const py::dict& sizes, const char* name) {
  const py::object size = sizes[name];
  int overflow = 0;
  const int64_t n = PyLong_Check(size.ptr()) ? PyLong_AsLongLongAndOverflow(size.ptr(), &overflow) : 0;
  if (overflow || n < 1 || n > 1 << 24)
    throw std::invalid_argument(std::string(name) + " must be a number from 1 to 16777216, got " +
                                py::cast<std::string>(py::repr(size)));
  return n;
}

class Model {
 public:
  Model(const py::dict& arrays, const std::string& precision, const py::dict& sizes,
        const std::vector<std::string>& pooling, const std::map<std::string, int64_t>& tasks, int threads)
      : workers_(std::make_unique<Workers>(threads)) {
    if (threads < 1 || threads > 1024)
      throw std::invalid_argument("threads must be from 1 to 1024, got " + std::to_string(threads));
    const int64_t hidden = size_of(sizes, "hidden"), width = 2 * hidden, head = size_of(sizes, "head");
    student_.precision = precision_of(precision);
    const Precision dense = student_.precision == Precision::int8 ? Precision::int8 : Precision::float32;
    Weights weights(arrays, student_.precision);
    student_.words = weights.words(size_of(sizes, "words"), size_of(sizes, "projection"));
    student_.encoder = weights.bilstm("encoder", hidden, student_.words.size);
    for (const std::string& name : pooling) student_.pooling.push_back(pooling_of(name));
    const bool attention = std::count(student_.pooling.begin(), student_.pooling.end(), Pooling::attention) > 0;
    const int64_t sides = size_of(sizes, "sides");
    if (sides > 2) throw std::invalid_argument("sides must be 1 or 2, got " + std::to_string(sides));
    for (int64_t i = 0; i < sides; ++i) {
      const std::string number = std::to_string(i);
      Side side;
      side.integrator = weights.bilstm("integrators." + number, hidden, 3 * width);
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
    Question question{ids.data(), std::vector<int64_t>(lengths.data(), lengths.data() + lengths.size()), pairs};
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
    int64_t sum = 0;
    for (const int64_t n : question.lengths) {
      if (n < 1 || n > tokens)
        throw std::invalid_argument("lengths must be from 1 to the number of ids, got " + std::to_string(n));
      sum += n;
    }
    if (sum != tokens)
      throw std::invalid_argument("lengths add up to " + std::to_string(sum) + ", but there are " +
                                  std::to_string(tokens) + " ids");
    if (tokens > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("a call takes at most 2147483647 ids");
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

}  // namespace
}  // namespace fastkd::runtime

PYBIND11_MODULE(_runtime, m) {
  using fastkd::runtime::Model;
  py::class_<Model>(m, "Model")
      .def(py::init<const py::dict&, const std::string&, const py::dict&, const std::vector<std::string>&,
                    const std::map<std::string, int64_t>&, int>(),
           py::arg("arrays"), py::arg("precision"), py::arg("sizes"), py::arg("pooling"), py::arg("tasks"),
           py::arg("threads"))
      .def("logits", &Model::logits, py::arg("task"), py::arg("ids"), py::arg("lengths"), py::arg("pairs"));
  m.def("cpu", [] {
    using fastkd::Target;
    const Target t = fastkd::target();
    const std::string name = t == Target::avx512 ? "AVX512" : t == Target::avx2 ? "AVX2" : "baseline";
    return t == Target::avx512 && fastkd::runtime::has_vnni() ? name + " VNNI" : name;
  });
}
