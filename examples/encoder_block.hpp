#pragma once

// A transformer encoder block for any attention, and what it needs around it: bytes as tokens, layer norm, a
// feed-forward network, seeded weights. Rows are tokens.

#include <nearfar/attention.hpp>

#include <cmath>
#include <cstddef>
#include <numbers>
#include <random>
#include <string_view>
#include <utility>

namespace encoder {

using nearfar::Index;
using Matrix = nearfar::Matrix<float>;

/// Independent normal numbers.
inline Matrix random_matrix(Index rows, Index cols, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, deviation);
  return Matrix::NullaryExpr(rows, cols, [&] { return normal(random); });
}

/// The weights of a linear layer; features of unit variance keep it.
inline Matrix random_weights(Index from, Index to, std::mt19937& random) {
  return random_matrix(from, to, 1 / std::sqrt(static_cast<float>(from)), random);
}

/// One token a byte: its row of `embedding` (256 x width) and the sine and cosine of its position.
inline Matrix embed(std::string_view text, const Matrix& embedding) {
  Matrix tokens(static_cast<Index>(text.size()), embedding.cols());
  for (Index i = 0; i < tokens.rows(); ++i) {
    const auto byte = static_cast<unsigned char>(text[static_cast<std::size_t>(i)]);
    for (Index c = 0; c < tokens.cols(); ++c) {
      const float rate = std::pow(1e-4F, static_cast<float>(c / 2 * 2) / static_cast<float>(tokens.cols()));
      const float angle = static_cast<float>(i) * rate;
      tokens(i, c) = embedding(byte, c) + (c % 2 == 0 ? std::sin(angle) : std::cos(angle));
    }
  }
  return tokens;
}

/// Every row less its mean, over its standard deviation.
inline Matrix layer_norm(const Matrix& tokens) {
  const Matrix centred = tokens.colwise() - tokens.rowwise().mean();
  const auto variance = centred.rowwise().squaredNorm().array() / static_cast<float>(tokens.cols());
  return centred.array().colwise() / (variance + 1e-5F).sqrt();
}

/// GELU in its tanh form.
inline Matrix gelu(const Matrix& x) {
  const auto a = x.array();
  return 0.5F * a * (1 + (0.7978846F * (a + 0.044715F * a.cube())).tanh());
}

/// The block, with layer norm first and weights drawn from a seed:
///
///   x += attention(norm(x) W_q, norm(x) W_k, norm(x) W_v) W_o
///   x += gelu(norm(x) W_1) W_2
template <nearfar::Attention Attention>
class EncoderBlock {
 public:
  EncoderBlock(Attention attention, Index width, std::mt19937 random)
      : attention_(std::move(attention)),
        w_q_(random_weights(width, attention_.heads().query_cols(), random)),
        w_k_(random_weights(width, attention_.heads().key_cols(), random)),
        w_v_(random_weights(width, attention_.heads().value_cols(), random)),
        w_o_(random_weights(attention_.heads().out_cols(), width, random)),
        w_1_(random_weights(width, 4 * width, random)),
        w_2_(random_weights(4 * width, width, random)) {}

  Matrix operator()(Matrix x) const {
    const Matrix normalised = layer_norm(x);
    const Matrix query = normalised * w_q_;
    const Matrix key = normalised * w_k_;
    const Matrix value = normalised * w_v_;
    Matrix attended(x.rows(), attention_.heads().out_cols());
    attention_.forward({query, key, value}, attended);
    x += attended * w_o_;

    x += gelu(layer_norm(x) * w_1_) * w_2_;
    return x;
  }

 private:
  Attention attention_;
  Matrix w_q_, w_k_, w_v_, w_o_, w_1_, w_2_;
};

}  // namespace encoder
