// Element types of the kernels; free of torch, as everything that the kernels include.
#pragma once

namespace fastkd {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace fastkd
