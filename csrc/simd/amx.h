// Products of bfloat16 pairs by whole tiles (Intel AMX). Written as assembly because neither the target that this is
// compiled for nor every assembler's user need have it; the compiler itself never touches a tile.
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and floats or pairs in each

// While it lives, this thread's tiles are whole ones. What another library had set up is put back.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } whole = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(whole));
  }
  ~TileScope() { asm volatile("ldtilecfg %0" ::"m"(before)); }
  TileScope(const TileScope&) = delete;

 private:
  struct alignas(64) {
    char bytes[64];
  } before;
};

#define FASTKD_LOAD_TILE(number, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #number::"r"(from), "r"(4 * (stride)) : "memory")
#define FASTKD_STORE_TILE(number, to, stride) \
  asm volatile("tilestored %%tmm" #number ", (%0,%1,1)" ::"r"(to), "r"(4 * (stride)) : "memory")
#define FASTKD_MULTIPLY_TILES(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

// c (16 or 32 rows, 2 tiles) = or += a · b, over a depth of whole tiles; strides in floats.
template <bool kTwo>
void tile_product(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                  bool accumulate) {
  float* lower = c + kTile * c_row;
  if (accumulate) {
    FASTKD_LOAD_TILE(0, c, c_row);
    FASTKD_LOAD_TILE(1, c + kTile, c_row);
    if (kTwo) FASTKD_LOAD_TILE(2, lower, c_row);
    if (kTwo) FASTKD_LOAD_TILE(3, lower + kTile, c_row);
  } else {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
  }
  for (int64_t k = 0; k < depth; k += kTile) {
    FASTKD_LOAD_TILE(6, b + k * b_row, b_row);
    FASTKD_LOAD_TILE(4, a + k, a_row);
    FASTKD_MULTIPLY_TILES(0, 4, 6);
    FASTKD_LOAD_TILE(7, b + k * b_row + kTile, b_row);
    FASTKD_MULTIPLY_TILES(1, 4, 7);
    if (!kTwo) continue;
    FASTKD_LOAD_TILE(5, a + k + kTile * a_row, a_row);
    FASTKD_MULTIPLY_TILES(2, 5, 6);
    FASTKD_MULTIPLY_TILES(3, 5, 7);
  }
  FASTKD_STORE_TILE(0, c, c_row);
  FASTKD_STORE_TILE(1, c + kTile, c_row);
  if (kTwo) FASTKD_STORE_TILE(2, lower, c_row);
  if (kTwo) FASTKD_STORE_TILE(3, lower + kTile, c_row);
}

#undef FASTKD_LOAD_TILE
#undef FASTKD_STORE_TILE
#undef FASTKD_MULTIPLY_TILES

}  // namespace
