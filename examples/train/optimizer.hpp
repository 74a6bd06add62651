#pragma once

#include "layers.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

namespace train {

/// Where the numbers of one parameter and of its gradient stand.
template <class T>
struct Variable {
  std::string name;
  std::span<T> value;
  std::span<T> gradient;
};

/// The parameters of a layer, of a model: of anything with for_each, which must stay where it is as long as they are
/// used.
template <class Layer>
std::vector<Variable<typename Layer::T>> variables_of(Layer& layer) {
  using T = typename Layer::T;
  std::vector<Variable<T>> variables;
  layer.for_each("", [&](const std::string& name, Matrix<T>& value, Matrix<T>& gradient) {
    const auto size = static_cast<std::size_t>(value.size());
    variables.push_back({name, {value.data(), size}, {gradient.data(), size}});
  });
  return variables;
}

struct AdamOptions {
  double rate = 1e-3;
  /// The rate grows from 0 within these steps and falls to 0 after the last of `steps`, both linearly. Where `steps` is
  /// 0, it stays.
  Index warm_up = 0;
  Index steps = 0;
  double beta_1 = 0.9;
  double beta_2 = 0.999;
  double eps = 1e-8;
  /// Gradients of a larger norm, over all parameters together, are shortened to it; 0 leaves them as they are.
  double clip = 1;
};

/// Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), with a rate that warms up and decays.
template <class T>
class Adam {
 public:
  Adam(std::vector<Variable<T>> variables, const AdamOptions& options)
      : variables_(std::move(variables)), options_(options) {
    for (const Variable<T>& variable : variables_) {
      moments_.push_back({Array::Zero(size(variable)), Array::Zero(size(variable))});
    }
  }

  /// The rate of step `step`, of which the first is 0.
  double rate(Index step) const {
    const auto now = static_cast<double>(step), top = static_cast<double>(options_.warm_up);
    if (now < top) return options_.rate * (now + 1) / top;
    if (options_.steps == 0) return options_.rate;
    const auto end = static_cast<double>(options_.steps);
    return options_.rate * std::max(0.0, end - now) / std::max(1.0, end - top);
  }

  /// Changes the parameters by their gradients and sets those to zero. Returns the norm that the gradients had.
  double step(Index step) {
    const double norm = gradient_norm();
    const auto shorten = static_cast<T>(options_.clip > 0 && norm > options_.clip ? options_.clip / norm : 1);
    const auto b1 = static_cast<T>(options_.beta_1), b2 = static_cast<T>(options_.beta_2);
    const double count = static_cast<double>(step + 1);
    const auto rate_now = static_cast<T>(rate(step) / (1 - std::pow(options_.beta_1, count)));
    const auto unbias_2 = static_cast<T>(1 / (1 - std::pow(options_.beta_2, count)));
    const auto eps = static_cast<T>(options_.eps);
    for (std::size_t i = 0; i < variables_.size(); ++i) {
      Eigen::Map<Array> value(variables_[i].value.data(), size(variables_[i]));
      Eigen::Map<Array> gradient(variables_[i].gradient.data(), size(variables_[i]));
      auto& [first, second] = moments_[i];
      gradient *= shorten;
      first = b1 * first + (1 - b1) * gradient;
      second = b2 * second + (1 - b2) * gradient.square();
      value -= rate_now * first / ((unbias_2 * second).sqrt() + eps);
      gradient.setZero();
    }
    return norm;
  }

  /// Calls visit(name, numbers) for all that a checkpoint must hold: the parameters and their moments.
  template <class Visit>
  void for_each(Visit&& visit) {
    for (std::size_t i = 0; i < variables_.size(); ++i) {
      visit(variables_[i].name, variables_[i].value);
      visit(variables_[i].name + ".first_moment", std::span<T>(moments_[i].first.data(), variables_[i].value.size()));
      visit(variables_[i].name + ".second_moment", std::span<T>(moments_[i].second.data(), variables_[i].value.size()));
    }
  }

 private:
  using Array = Eigen::Array<T, Eigen::Dynamic, 1>;
  struct Moments {
    Array first, second;
  };

  static Index size(const Variable<T>& variable) { return static_cast<Index>(variable.value.size()); }

  double gradient_norm() const {
    double sum = 0;
    for (const Variable<T>& variable : variables_) {
      sum +=
          static_cast<double>(Eigen::Map<const Array>(variable.gradient.data(), size(variable)).matrix().squaredNorm());
    }
    return std::sqrt(sum);
  }

  std::vector<Variable<T>> variables_;
  std::vector<Moments> moments_;
  AdamOptions options_;
};

}  // namespace train
