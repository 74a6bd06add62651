// A mechanism of one's own: a type with Scalar, heads() and forward is an Attention, and fits wherever nearfar's do. As
// they do, it checks what it is given before it writes.

#include "encoder_block.hpp"

#include <nearfar/nearfar.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>

using nearfar::Index;

/// Average attention: every token sees the plain mean of the values up to its own.
///
///   out_i = mean_{j <= i} v_j
///
/// Zhang, Xiong and Su, Accelerating Neural Transformer via an Average Attention Network, arXiv 1805.00631, equation 1.
/// Time O(n); memory of one row of values. Masked keys are left out; a query that sees no key gets a zero row.
/// Throws std::invalid_argument if heads do not fit together or inputs and out do not fit them.
template <class T>
class AverageAttention {
 public:
  using Scalar = T;

  explicit AverageAttention(const nearfar::Heads& heads) : heads_(heads) {
    nearfar::check_heads("AverageAttention", heads);
  }

  const nearfar::Heads& heads() const { return heads_; }

  void forward(const nearfar::Inputs<T>& inputs, nearfar::Tokens<T> out) const {
    nearfar::check_inputs<T>("AverageAttention", heads_, inputs, out, nearfar::Lengths::any);
    const Index width = heads_.value_width();
    nearfar::Matrix<T> sum(1, heads_.value_cols());
    for (Index b = 0; b < nearfar::sequence_count(inputs); ++b) {
      const nearfar::Sequence rows = nearfar::sequence(inputs, b);
      const std::uint8_t* mask = nearfar::key_mask(inputs, rows);
      const auto value = inputs.value.middle_rows(rows.key_begin, rows.key_count).matrix();
      auto result = out.middle_rows(rows.query_begin, rows.query_count).matrix();

      const nearfar::Band causal(nearfar::Window{}.causal(), rows.query_count, rows.key_count);
      Index next = 0, seen = 0;
      sum.setZero();
      for (Index i = 0; i < rows.query_count; ++i) {
        for (; next < causal.end(i); ++next) {
          if (mask != nullptr && mask[next] == 0) continue;
          sum += value.row(next);
          ++seen;
        }
        for (Index h = 0; h < heads_.query; ++h) {
          result.row(i).segment(h * width, width) =
              sum.row(0).segment(h / heads_.group() * width, width) / static_cast<T>(std::max<Index>(seen, 1));
        }
      }
    }
  }

 private:
  nearfar::Heads heads_;
};
static_assert(nearfar::Attention<AverageAttention<float>>);

int main() {
  using namespace encoder;
  const nearfar::Heads heads{.query = 4, .key_value = 4, .dim = 16};
  const Index width = 64;
  std::mt19937 random(1);
  const Matrix tokens =
      embed("the same block runs any attention, yours and ours", random_matrix(256, width, 1, random));

  const EncoderBlock ours(nearfar::Softmax<float>(heads, {.causal = true}), width, random);
  const EncoderBlock own(AverageAttention<float>(heads), width, random);
  const Matrix exact = ours(tokens), average = own(tokens);

  const auto distance = [&](Index first, Index count) {
    return (average - exact).middleRows(first, count).norm() / exact.middleRows(first, count).norm();
  };
  std::printf("distance of average attention from softmax: first token %.4f, which sees itself alone; others %.4f\n",
              distance(0, 1), distance(1, tokens.rows() - 1));
}
