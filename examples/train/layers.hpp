#pragma once

// The layers around attention, each with its backward pass. Rows are tokens.
//
// A layer's forward(x) returns y, in memory of its own, and may keep the view x: x must stay as it is until backward.
// backward(grad_y) adds to the gradients of the parameters, so that a batch may be split, and returns grad_x.
// for_each(prefix, visit) calls visit(prefix + name, value, gradient) for each of the parameters.

#include "random.hpp"

#include <nearfar/tokens.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

namespace train {

using nearfar::Matrix;
using nearfar::Tokens;

template <class T>
struct Parameter {
  Matrix<T> value;
  Matrix<T> gradient;

  /// Uniform numbers in [-reach, reach].
  Parameter(Index rows, Index cols, double reach, Random& random) : Parameter(rows, cols, T(0)) {
    for (T& number : value.reshaped()) number = static_cast<T>(reach * (2 * random.uniform() - 1));
  }

  Parameter(Index rows, Index cols, T constant)
      : value(Matrix<T>::Constant(rows, cols, constant)), gradient(Matrix<T>::Zero(rows, cols)) {}
};

/// Memory for rows whose number changes from batch to batch. It is taken anew only for more rows than ever before.
template <class T>
class Buffer {
 public:
  explicit Buffer(Index cols) : storage_(0, cols) {}

  Tokens<T> rows(Index count) {
    if (count > storage_.rows()) storage_.resize(count, storage_.cols());
    return Tokens<T>(storage_).middle_rows(0, count);
  }

 private:
  Matrix<T> storage_;
};

/// y = x W + b, from `from` to `to` columns.
template <class T>
class Dense {
 public:
  Dense(Index from, Index to, Random& random)
      : weight_(from, to, 1 / std::sqrt(static_cast<double>(from)), random),
        bias_(1, to, 1 / std::sqrt(static_cast<double>(from)), random),
        y_(to),
        grad_x_(from) {}

  Tokens<T> forward(Tokens<const T> x) {
    x_ = x;
    const Tokens<T> y = y_.rows(x.rows());
    y.matrix().rowwise() = bias_.value.row(0);
    y.matrix().noalias() += x.matrix() * weight_.value;
    return y;
  }

  Tokens<T> backward(Tokens<const T> grad_y) {
    weight_.gradient.noalias() += x_.matrix().transpose() * grad_y.matrix();
    bias_.gradient += grad_y.matrix().colwise().sum();
    const Tokens<T> grad_x = grad_x_.rows(grad_y.rows());
    grad_x.matrix().noalias() = grad_y.matrix() * weight_.value.transpose();
    return grad_x;
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    visit(prefix + "weight", weight_.value, weight_.gradient);
    visit(prefix + "bias", bias_.value, bias_.gradient);
  }

 private:
  Parameter<T> weight_, bias_;
  Buffer<T> y_, grad_x_;
  Tokens<const T> x_;
};

/// How an embedding starts. `small`: all numbers random, with a standard deviation of 0.02. `apart`: tokens in the
/// first half of the columns, random with a standard deviation of 1, and positions in the second, as the sinusoids of
/// Vaswani et al. (arXiv 1706.03762, section 3.5), so that what depends on distance alone is easy to find.
enum class EmbeddingStart { small, apart };

/// y_i = token[id_i] + position[i], where i counts within each sequence.
template <class T>
class Embedding {
 public:
  Embedding(Index vocabulary, Index max_length, Index width, EmbeddingStart start, Random& random)
      : token_(vocabulary, width, 0.02 * reach, random), position_(max_length, width, 0.02 * reach, random), y_(width) {
    if (start == EmbeddingStart::small) return;
    const Index half = width / 2;
    token_.value *= T(1 / 0.02);
    token_.value.rightCols(width - half).setZero();
    position_.value.setZero();
    for (Index i = 0; i < max_length; ++i) {
      for (Index c = half; c < width; ++c) {
        const double pair = static_cast<double>((c - half) / 2 * 2) / static_cast<double>(width - half);
        const double angle = static_cast<double>(i) * std::pow(1e4, -pair);
        position_.value(i, c) = static_cast<T>((c - half) % 2 == 0 ? std::sin(angle) : std::cos(angle));
      }
    }
  }

  /// `ids` holds sequences end to end, divided by `offsets` as in nearfar::Inputs.
  Tokens<T> forward(std::span<const int> ids, std::span<const Index> offsets) {
    ids_ = ids;
    offsets_ = offsets;
    const Tokens<T> y = y_.rows(static_cast<Index>(ids.size()));
    for_each_token([&](Index i, Index id, Index position) {
      y.matrix().row(i) = token_.value.row(id) + position_.value.row(position);
    });
    return y;
  }

  void backward(Tokens<const T> grad_y) {
    for_each_token([&](Index i, Index id, Index position) {
      token_.gradient.row(id) += grad_y.matrix().row(i);
      position_.gradient.row(position) += grad_y.matrix().row(i);
    });
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    visit(prefix + "token", token_.value, token_.gradient);
    visit(prefix + "position", position_.value, position_.gradient);
  }

 private:
  static constexpr double reach = 1.7320508;  // of uniform numbers with a standard deviation of 1

  template <class Visit>
  void for_each_token(Visit&& visit) const {
    for (std::size_t b = 0; b + 1 < offsets_.size(); ++b) {
      const Index length = offsets_[b + 1] - offsets_[b];
      if (length > position_.value.rows()) {
        throw std::invalid_argument("this model has " + std::to_string(position_.value.rows()) +
                                    " positions, but a sequence has " + std::to_string(length) + " tokens.");
      }
      for (Index i = 0; i < length; ++i) {
        const Index row = offsets_[b] + i;
        visit(row, static_cast<Index>(ids_[static_cast<std::size_t>(row)]), i);
      }
    }
  }

  Parameter<T> token_, position_;
  Buffer<T> y_;
  std::span<const int> ids_;
  std::span<const Index> offsets_;
};

/// y = (x - mean(x)) / deviation(x) * gain + bias, for every row x.
template <class T>
class LayerNorm {
 public:
  explicit LayerNorm(Index width)
      : gain_(1, width, T(1)), bias_(1, width, T(0)), y_(width), grad_x_(width), moments_(2) {}

  Tokens<const T> forward(Tokens<const T> x) {
    x_ = x;
    const Tokens<T> y = y_.rows(x.rows()), moments = moments_.rows(x.rows());
    for (Index i = 0; i < x.rows(); ++i) {
      const Row row(x.row(i), x.cols());
      const T mean = row.mean();
      const T inverse_deviation = 1 / std::sqrt((row - mean).square().mean() + T(1e-5));
      moments(i, 0) = mean;
      moments(i, 1) = inverse_deviation;
      MutableRow(y.row(i), y.cols()) =
          (row - mean) * inverse_deviation * gain_.value.row(0).array() + bias_.value.row(0).array();
    }
    return y;
  }

  /// With z = (x - mean) / deviation and g = grad_y * gain: grad_x = (g - mean(g) - z mean(g z)) / deviation.
  Tokens<T> backward(Tokens<const T> grad_y) {
    const Tokens<T> grad_x = grad_x_.rows(grad_y.rows()), moments = moments_.rows(grad_y.rows());
    for (Index i = 0; i < grad_y.rows(); ++i) {
      const Row x(x_.row(i), x_.cols()), grad(grad_y.row(i), grad_y.cols());
      const T mean = moments(i, 0), inverse_deviation = moments(i, 1);
      const auto z = (x - mean) * inverse_deviation;
      const auto g = grad * gain_.value.row(0).array();
      const T mean_g = g.mean(), mean_gz = (g * z).mean();
      MutableRow(grad_x.row(i), grad_x.cols()) = (g - mean_g - z * mean_gz) * inverse_deviation;
      gain_.gradient.row(0).array() += grad * z;
      bias_.gradient.row(0).array() += grad;
    }
    return grad_x;
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    visit(prefix + "gain", gain_.value, gain_.gradient);
    visit(prefix + "bias", bias_.value, bias_.gradient);
  }

 private:
  using MutableRow = Eigen::Map<Eigen::Array<T, 1, Eigen::Dynamic>>;
  using Row = Eigen::Map<const Eigen::Array<T, 1, Eigen::Dynamic>>;

  Parameter<T> gain_, bias_;
  Buffer<T> y_, grad_x_, moments_;
  Tokens<const T> x_;
};

/// GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415): y = x / 2 (1 + tanh(a (x + b x^3))).
template <class T>
class Gelu {
 public:
  explicit Gelu(Index width) : y_(width), grad_x_(width) {}

  Tokens<T> forward(Tokens<const T> x) {
    x_ = x;
    const Tokens<T> y = y_.rows(x.rows());
    const auto v = x.matrix().array();
    y.matrix() = T(0.5) * v * (1 + (a * v * (1 + b * v.square())).tanh());
    return y;
  }

  Tokens<T> backward(Tokens<const T> grad_y) {
    const Tokens<T> grad_x = grad_x_.rows(grad_y.rows());
    const auto v = x_.matrix().array();
    auto t = grad_x.matrix().array();
    t = (a * v * (1 + b * v.square())).tanh();
    t = grad_y.matrix().array() * T(0.5) * (1 + t + v * (1 - t.square()) * a * (1 + 3 * b * v.square()));
    return grad_x;
  }

 private:
  static constexpr T a = T(0.7978845608028654), b = T(0.044715);

  Buffer<T> y_, grad_x_;
  Tokens<const T> x_;
};

/// Sets entries to zero with probability `rate` and divides the others by 1 - rate; without a generator y = x.
///
/// Which entries are kept is a function of the number drawn in forward and of the entry's place, so that backward finds
/// it again instead of reading it from memory.
template <class T>
class Dropout {
 public:
  Dropout(Index width, double rate) : rate_(rate), grad_x_(width) {
    if (!(rate >= 0 && rate < 1)) {
      throw std::invalid_argument("dropout must be at least 0 and less than 1, but is " + std::to_string(rate) + ".");
    }
  }

  /// Changes x where it stands, and returns it: no layer needs what it gave for its own backward pass.
  Tokens<T> forward(Tokens<T> x, Random* random) {
    active_ = random != nullptr && rate_ > 0;
    if (active_) {
      drawn_ = static_cast<std::uint32_t>(random->bits());
      mask(x, x);
    }
    return x;
  }

  Tokens<const T> backward(Tokens<const T> grad_y) {
    if (!active_) return grad_y;
    const Tokens<T> grad_x = grad_x_.rows(grad_y.rows());
    mask(grad_y, grad_x);
    return grad_x;
  }

 private:
  void mask(Tokens<const T> from, Tokens<T> to) const {
    const auto threshold = static_cast<std::uint32_t>(rate_ * 4294967296.0);
    const T scale = static_cast<T>(1 / (1 - rate_));
    const auto cols = static_cast<std::uint32_t>(from.cols());
    for (Index i = 0; i < from.rows(); ++i) {
      const T* const read = from.row(i);
      T* const write = to.row(i);
      const std::uint32_t first = scattered(static_cast<std::uint32_t>(i) + drawn_);
      for (std::uint32_t c = 0; c < cols; ++c) {
        write[c] = read[c] * (scattered(first + c) >= threshold ? scale : T(0));
      }
    }
  }

  /// Scatters the bits of a number: multiplications and shifts, each of which can be undone.
  static std::uint32_t scattered(std::uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352dU;
    x = (x ^ (x >> 15)) * 0x846ca68bU;
    return x ^ (x >> 16);
  }

  double rate_;
  bool active_ = false;
  std::uint32_t drawn_ = 0;
  Buffer<T> grad_x_;
};

/// A row for each sequence: the mean of its tokens, zero where there is none.
template <class T>
class MeanPooling {
 public:
  explicit MeanPooling(Index width) : y_(width), grad_x_(width) {}

  Tokens<const T> forward(Tokens<const T> x, std::span<const Index> offsets) {
    offsets_ = offsets;
    const Tokens<T> y = y_.rows(sequences());
    for (Index b = 0; b < y.rows(); ++b) {
      y.matrix().row(b) = tokens(x, b).matrix().colwise().sum() / std::max<T>(1, static_cast<T>(length(b)));
    }
    return y;
  }

  Tokens<T> backward(Tokens<const T> grad_y) {
    const Tokens<T> grad_x = grad_x_.rows(offsets_.back());
    for (Index b = 0; b < grad_y.rows(); ++b) {
      if (length(b) == 0) continue;
      tokens(grad_x, b).matrix().rowwise() = grad_y.matrix().row(b) / static_cast<T>(length(b));
    }
    return grad_x;
  }

 private:
  Index sequences() const { return static_cast<Index>(offsets_.size()) - 1; }
  Index begin(Index b) const { return offsets_[static_cast<std::size_t>(b)]; }
  Index length(Index b) const { return begin(b + 1) - begin(b); }

  template <class Scalar>
  Tokens<Scalar> tokens(Tokens<Scalar> x, Index b) const {
    return x.middle_rows(begin(b), length(b));
  }

  Buffer<T> y_, grad_x_;
  std::span<const Index> offsets_;
};

/// What a model got of some targets.
struct Loss {
  double cross_entropy = 0;  ///< a sum, in nats
  Index correct = 0;
  Index targets = 0;

  Loss& operator+=(const Loss& other) {
    cross_entropy += other.cross_entropy;
    correct += other.correct;
    targets += other.targets;
    return *this;
  }
};

/// The target of a row that has none.
inline constexpr int no_target = -1;

/// Softmax cross-entropy of each row of logits (a class a column) with its target.
///
/// grad_logits = weight * (softmax(logits) - [class = target]), the gradient of weight * the sum; zero without a
/// target.
template <class T>
Loss cross_entropy(Tokens<const T> logits, std::span<const int> targets, T weight, Tokens<T> grad_logits) {
  Loss loss;
  for (Index i = 0; i < logits.rows(); ++i) {
    const int target = targets[static_cast<std::size_t>(i)];
    const auto row = logits.matrix().row(i).array();
    auto grad = grad_logits.matrix().row(i).array();
    if (target == no_target) {
      grad.setZero();
      continue;
    }
    Index best;
    const T max = row.maxCoeff(&best);
    grad = (row - max).exp();
    const T sum = grad.sum();
    loss.cross_entropy += static_cast<double>(max + std::log(sum) - row(target));
    loss.correct += best == target;
    loss.targets += 1;
    grad *= weight / sum;
    grad(target) -= weight;
  }
  return loss;
}

}  // namespace train
