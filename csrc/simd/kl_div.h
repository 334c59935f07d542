// KL and JSD of two rows of logits with the gradient, compiled once per target.
#include "simd/kl_div_sums.h"

namespace {

// The gradient in the student's logits, per * d(divergence), from what the tile has kept. sink(r) makes put(i, g) of a
// strip.
template <Divergence D, class Tile, class F>
void soft_gradient(Tile& tile, const Sums& all, const Mixture& m, Vec per, F sink) {
  const Vec of_first = D == Divergence::jsd       ? per
                       : D == Divergence::reverse ? per * all.per_s * all.inverse_t
                                                  : per * all.per_s;
  const Vec of_second = D == Divergence::jsd ? m.to_student : D == Divergence::reverse ? all.cross : -per * all.per_t;
  const int64_t steps = tile.steps();
  for (int r = 0; r < tile.strips(); ++r) {
    const auto put = sink(r);
    const Pairs pairs = tile.pairs(r);
    for (int64_t begin = 0; begin < steps; begin += Tile::kBlock) {
      const int64_t end = begin + Tile::kBlock < steps ? begin + Tile::kBlock : steps;
      Vec u = Tile::spread(of_first, r), v = Tile::spread(of_second, r);
      if (!Tile::kOneBlock && D != Divergence::jsd) {
        u *= all.decay_s(tile.maxima().first(begin / Tile::kBlock));
        if (D == Divergence::forward) v *= all.decay_t(tile.maxima().second(begin / Tile::kBlock));
      }
      for (int64_t i = begin; i < end; ++i) {
        const Vec first = pairs.first(i), second = pairs.second(i);
        put(i, D == Divergence::forward ? fma(first, u, second * v) : first * u * (second - v));
      }
    }
  }
}

// As above, with the hard labels' part and with rows that have no gradient.
template <Divergence D, class Tile>
void gradient(Tile& tile, const Sums& all, const Mixture& m, const Extras& e, const Lanes& lanes, VecInt alive, Vec per,
              float hard) {
  if (hard == 0.0f && !any(~alive)) {
    soft_gradient<D>(tile, all, m, per,
                     [&](int r) { return [out = tile.output(r)](int64_t i, Vec g) { out.put(i, g); }; });
    return;
  }
  const Vec live = select(alive, splat(1.0f), Vec{});
  const auto write = [&](int r) {
    const VecInt keep = Tile::spread(live, r) > 0.0f;
    return [keep, out = tile.output(r)](int64_t i, Vec g) { out.put(i, select(keep, g, Vec{})); };
  };
  if (hard == 0.0f) return soft_gradient<D>(tile, all, m, per, write);
  soft_gradient<D>(tile, all, m, per,
                   [&](int r) { return [pairs = tile.pairs(r)](int64_t i, Vec g) { pairs.keep_first(i, g); }; });
  for (int r = 0; r < tile.strips(); ++r) {
    const Vec top = Tile::spread(e.top, r), of_1 = Tile::spread(hard * e.per_1, r),
              label = Tile::spread(lanes.label, r);
    const auto put = write(r);
    const Pairs pairs = tile.pairs(r);
    tile.each(r, 0, tile.steps(), [&](int64_t i, Vec x, Vec) {
      const Vec g = pairs.first(i) + exp2((x - top) * kLog2e) * of_1;
      put(i, g - select(tile.column(i) == label, splat(hard), Vec{}));
    });
  }
}

template <class Tile>
void write(float* out, int64_t row, int64_t rows, Vec v) {
  if (Tile::kRows == kLanes && row + kLanes <= rows) return store(out + row, v);
  for (int64_t k = 0; k < Tile::kRows && row + k < rows; ++k) out[row + k] = v[k];
}

template <Divergence D, class Tile>
void compute(const KlDivTask& task, int64_t row, Tile& tile, const Lanes& lanes) {
  const bool keep = task.grad != nullptr;
  const Sums s = Sweep<D, Tile>(tile, lanes, keep).run();
  Mixture m{};
  if (D == Divergence::jsd) m = mix(tile, s, splat(task.beta), keep);
  const float hard = task.labels ? task.cross_entropy_weight : 0.0f;
  Extras e{};
  if (hard != 0.0f || task.stats) e = look(tile, s);

  const Vec nats = D == Divergence::forward   ? fma(s.cross, s.inverse_t, s.gap)
                   : D == Divergence::reverse ? fma(s.cross, s.inverse_t, -s.gap)
                                              : m.loss;
  const bool square = task.scale_by_temperature;
  Vec loss = square ? nats * lanes.temperature * lanes.temperature : nats;
  Vec cross_entropy{};
  VecInt infinite = s.infinite;
  if (task.labels && (hard != 0.0f || task.stats)) {
    cross_entropy = e.log_1 + (e.top - lanes.label_logit);
    if (hard != 0.0f) {
      loss += hard * cross_entropy;
      infinite |= (lanes.label_logit == -kInfinity) & ~s.empty_s;
    }
  }
  const VecInt exists = lanes.valid & ~(s.empty_s & s.empty_t), alive = exists & ~infinite;
  loss = select(infinite & exists, splat(kInfinity), select(alive, loss, Vec{}));
  write<Tile>(task.loss, row, task.rows, loss);
  if (task.stats) {
    const VecInt seen = lanes.valid & ~(s.empty_s | s.empty_t);
    const Vec stats[] = {cross_entropy, e.entropy_s, e.entropy_t, e.agreement};
    for (int k = 0; k < 4; ++k) write<Tile>(task.stats + k * task.rows, row, task.rows, select(seen, stats[k], Vec{}));
  }
  if (!keep) return;
  // d(divergence) / dz is a difference of probabilities over T, for jsd weighted by the student's share of the mixture.
  const Vec share = splat(D == Divergence::jsd ? (1.0f - task.beta) * task.grad_scale : task.grad_scale);
  const Vec per = share * (square ? lanes.temperature : lanes.inverse_t);
  gradient<D>(tile, s, m, e, lanes, alive, per, hard * task.grad_scale);
}

template <class Tile, class T>
void tiles(const KlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  const auto run = task.divergence == Divergence::forward   ? compute<Divergence::forward, Tile>
                   : task.divergence == Divergence::reverse ? compute<Divergence::reverse, Tile>
                                                            : compute<Divergence::jsd, Tile>;
  for (int64_t row = begin; row < end; row += Tile::kRows) {
    if (Tile::kRows == 1 && task.valid && !task.valid[row]) {
      task.loss[row] = 0;
      if (task.grad) std::memset((T*)task.grad + row * task.vocabulary, 0, task.vocabulary * sizeof(T));
      continue;
    }
    Tile tile(task, row, scratch);
    run(task, row, tile, Lanes(task, row, Tile::kRows, (const T*)task.student));
    if (task.grad) tile.finish(task);
  }
}

template <class T>
void rows_of(const KlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  if (task.vocabulary <= kShortColumns) return tiles<ShortRows<T>, T>(task, begin, end, scratch);
  if (task.vocabulary <= kGroupColumns) return tiles<Rows<T, kLanes>, T>(task, begin, end, scratch);
  tiles<Rows<T, 1>, T>(task, begin, end, scratch);
}

}  // namespace

// Rows begin..end; where rows share a tile begin must be a multiple of 16, so that results do not depend on the split.
static void kl_div(const KlDivTask& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.dtype) {
    case Dtype::float32:
      return rows_of<float>(task, begin, end, scratch);
    case Dtype::bfloat16:
      return rows_of<BFloat16>(task, begin, end, scratch);
    case Dtype::float16:
      return rows_of<Half>(task, begin, end, scratch);
  }
}
