// What the classes of python.cpp are made of: arrays of numpy and options, checked.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/student.h"

namespace fastkd::runtime {

namespace py = pybind11;

inline Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::float32;
  if (name == "bfloat16") return Precision::bfloat16;
  if (name == "int8") return Precision::int8;
  throw std::invalid_argument("precision must be float32, bfloat16 or int8, got " + name);
}

inline int64_t check_size(const char* name, const py::object& size) {
  int overflow = 0;
  const int64_t n = PyLong_Check(size.ptr()) ? PyLong_AsLongLongAndOverflow(size.ptr(), &overflow) : 0;
  if (overflow || n < 1 || n > 1 << 24)
    throw std::invalid_argument(std::string(name) + " must be a whole number from 1 to 16777216, got " +
                                py::cast<std::string>(py::repr(size)));
  return n;
}

inline int check_threads(int threads) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("threads must be from 1 to 1024, got " + std::to_string(threads));
  return threads;
}

// Lengths of sequences that are `tokens` of what the caller calls `rows` in all.
inline std::vector<int64_t> check_lengths(const py::array_t<int64_t, py::array::c_style>& lengths, int64_t tokens,
                                          const std::string& rows) {
  int64_t sum = 0;
  for (py::ssize_t i = 0; i < lengths.size(); ++i) {
    const int64_t n = lengths.data()[i];
    if (n < 1 || n > tokens)
      throw std::invalid_argument("lengths must be from 1 to the number of " + rows + ", got " + std::to_string(n));
    sum += n;
  }
  if (sum != tokens)
    throw std::invalid_argument("lengths add up to " + std::to_string(sum) + ", but there are " +
                                std::to_string(tokens) + " " + rows);
  if (tokens > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("a call takes at most 2147483647 " + rows);
  return {lengths.data(), lengths.data() + lengths.size()};
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

  std::vector<Direction> bilstm(const std::string& layer, int64_t hidden, int64_t inputs) {
    std::vector<Direction> directions;
    for (const bool backward : {false, true}) {
      const std::string prefix = layer + (backward ? "backward." : "forward.");
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
      const float* rows = take<float>("words", {count, size});  // or refuses the sizes, before memory of them is taken
      w.rows = Memory(count * size * (int64_t)sizeof(float));
      std::memcpy(w.rows.as(), rows, count * size * sizeof(float));
    }
    return w;
  }

 private:
  const py::dict& arrays_;
  const Precision precision_;
};

}  // namespace fastkd::runtime
