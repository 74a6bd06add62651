#pragma once

#include <nearfar/engine/multipole/pooling_convolution.hpp>

#include <cmath>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// How a group of tokens becomes `rank` pooled keys and values.
enum class Pooling {
  average,                   ///< the mean of each of its `rank` sub-blocks
  grouped_convolution,       ///< the authors' learned pooling: every level pools the tokens
  hierarchical_convolution,  ///< learned, each level from the pooled rows of the level below: linear in n
};

namespace detail {

/// What stands for the far tokens of one sequence: the pooled keys and values of all levels, how many tokens each
/// stands for, and what its scores start from: log2 of its mass, or -infinity for one that stands for no token.
template <class T>
struct FarField {
  HeadRows<T> key;
  HeadRows<T> value;
  T* mass = nullptr;
  T* bias = nullptr;
};

template <class T>
FarField<T> take_far_field(Work& work, const Hierarchy& tree, const Heads& heads) {
  return {take_head_rows<T>(work, tree.rows(), heads.key_value, heads.dim),
          take_head_rows<T>(work, tree.rows(), heads.key_value, heads.dim), work.take<T>(tree.rows()),
          work.take<T>(tree.rows())};
}

/// How the keys and values of one sequence become its far field, and the gradient of that their gradients. `inputs`
/// begin with the tree's first token.
template <class T>
struct FarFieldPooling {
  Work& work;
  const Hierarchy& tree;
  const Heads& heads;
  const Inputs<T>& inputs;
  Pooling pooling;
  bool mass_scaling;
  const std::vector<PoolingConvolution<T>>& key_levels;  ///< of learned pooling
  const std::vector<PoolingConvolution<T>>& value_levels;

  /// The upward pass.
  void upward(const FarField<T>& far) const {
    count_tokens(tree, key_mask(inputs), far.mass);
    if (pooling != Pooling::average) share_mass(tree, far.mass);
    upward(inputs.key, far.mass, key_levels, far.key);
    upward(inputs.value, far.mass, value_levels, far.value);
    for (Index row = 0; row < tree.rows(); ++row) {
      far.bias[row] = mass_scaling || far.mass[row] == T(0) ? std::log2(far.mass[row]) : T(0);
    }
  }

  /// The gradient's downward pass: adds to the gradients of keys, values and learned weights.
  void downward(const FarField<T>& far, const FarField<T>& grad_far, const InputGradients<T>& gradients,
                std::vector<PoolingConvolution<T>>& grad_key_levels,
                std::vector<PoolingConvolution<T>>& grad_value_levels) const {
    downward(inputs.key, far.mass, key_levels, far.key, grad_far.key, gradients.key, grad_key_levels);
    downward(inputs.value, far.mass, value_levels, far.value, grad_far.value, gradients.value, grad_value_levels);
  }

 private:
  using Levels = std::vector<PoolingConvolution<T>>;

  void upward(Tokens<const T> tokens, const T* mass, const Levels& levels, HeadRows<T> pooled) const {
    const auto rows = head_rows(tokens, heads.key_value);
    if (pooling == Pooling::average) return pool_average<T>(work, tree, rows, key_mask(inputs), mass, pooled);
    convolution(mass, levels).forward(rows, pooled);
  }

  void downward(Tokens<const T> tokens, const T* mass, const Levels& levels, HeadRows<T> pooled,
                HeadRows<T> grad_pooled, Tokens<T> grad_tokens, Levels& grad_levels) const {
    const auto grad_rows = head_rows(grad_tokens, heads.key_value);
    if (pooling == Pooling::average) {
      return pool_average_backward<T>(work, tree, key_mask(inputs), mass, grad_pooled, grad_rows);
    }
    convolution(mass, levels).backward(head_rows(tokens, heads.key_value), pooled, grad_pooled, grad_rows, grad_levels);
  }

  ConvolutionPooling<T> convolution(const T* mass, const Levels& levels) const {
    return {work, tree, pooling == Pooling::hierarchical_convolution, levels, heads.dim, key_mask(inputs), mass};
  }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
