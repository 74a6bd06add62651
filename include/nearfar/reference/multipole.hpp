#pragma once

#include <nearfar/reference/head.hpp>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace reference {

enum class Pooling { average, grouped_convolution, hierarchical_convolution };

/// A learned pooling of `window` rows into `rank`: row c * rank + r of weight and bias makes feature c of pooled row r.
template <class T>
struct Convolution {
  Matrix<T> weight;  ///< (dim * rank) x window
  Matrix<T> bias;    ///< 1 x (dim * rank)
};

template <class T>
struct MultipoleTerms {
  Index block = 1;
  Index rank = 1;
  bool causal = false;
  bool mass_scaling = true;
  Pooling pooling = Pooling::average;
  bool pooled_queries = false;
  bool all_queries = false;  ///< whether the mean of a sub-block's queries takes in those masked as keys
  std::optional<double> scale = {};
  std::vector<Convolution<T>> key_convolutions = {};  ///< level l at index l - 1
  std::vector<Convolution<T>> value_convolutions = {};
};

/// max(0, ceil(log2(n / block)) - 1): the fewest levels whose groups reach everything.
inline Index multipole_levels(Index n, Index block) {
  Index levels = 0;
  while (block << (levels + 1) < n) ++levels;
  return levels;
}

/// The pooled keys and values of one level: rank rows a group. Mass 0 marks rows that stand for no token.
template <class T>
struct PooledLevel {
  Index group_width;
  Matrix<T> key;
  Matrix<T> value;
  std::vector<T> mass;
};

template <class T>
Index count_usable(const Head<T>& head, Index first, Index end) {
  Index count = 0;
  for (Index j = first; j < std::min(end, head.key.rows()); ++j) count += usable(head, j);
  return count;
}

/// Row c is the mean of the rows of sub-block c that count: all present ones, or the usable ones of them. 0 where none.
template <class T>
Matrix<T> sub_block_means(const Head<T>& head, const Matrix<T>& rows, Index sub_block, Index count, bool all) {
  Matrix<T> means = Matrix<T>::Zero(count, rows.cols());
  for (Index c = 0; c < count; ++c) {
    Index taken = 0;
    for (Index j = c * sub_block; j < std::min((c + 1) * sub_block, rows.rows()); ++j) {
      if (!all && !usable(head, j)) continue;
      means.row(c) += rows.row(j);
      ++taken;
    }
    if (taken > 0) means.row(c) /= static_cast<T>(taken);
  }
  return means;
}

/// pooled(g * rank + r, c) = bias(c * rank + r) + sum_t weight(c * rank + r, t) children(g * window + t, c), over the
/// children that are present.
template <class T>
Matrix<T> convolve(const Convolution<T>& convolution, Index rank, Index groups, const Matrix<T>& children,
                   const std::vector<bool>& present) {
  const Index window = convolution.weight.cols();
  Matrix<T> pooled(groups * rank, children.cols());
  for (Index row = 0; row < pooled.rows(); ++row) {
    const Index first_child = row / rank * window;
    for (Index c = 0; c < pooled.cols(); ++c) {
      const Index channel = c * rank + row % rank;
      pooled(row, c) = convolution.bias(0, channel);
      for (Index child = first_child; child < std::min(first_child + window, children.rows()); ++child) {
        if (!present[static_cast<std::size_t>(child)]) continue;
        pooled(row, c) += convolution.weight(channel, child - first_child) * children(child, c);
      }
    }
  }
  return pooled;
}

/// Level l = 1, 2, ... of the hierarchy; `below` is level l - 1, or null where l = 1.
template <class T>
PooledLevel<T> pool_level(const Head<T>& head, Index l, const PooledLevel<T>* below, const MultipoleTerms<T>& terms) {
  const Index width = terms.block << (l - 1);
  const Index groups = (head.key.rows() + width - 1) / width;
  const Index rows = groups * terms.rank;
  PooledLevel<T> level{width, {}, {}, std::vector<T>(static_cast<std::size_t>(rows))};
  if (terms.pooling == Pooling::average) {
    const Index sub_block = width / terms.rank;
    level.key = sub_block_means(head, head.key, sub_block, rows, false);
    level.value = sub_block_means(head, head.value, sub_block, rows, false);
    for (Index c = 0; c < rows; ++c) {
      level.mass[static_cast<std::size_t>(c)] = static_cast<T>(count_usable(head, c * sub_block, (c + 1) * sub_block));
    }
    return level;
  }
  const auto at = static_cast<std::size_t>(l - 1);
  if (terms.pooling == Pooling::grouped_convolution || below == nullptr) {
    level.key = convolve(terms.key_convolutions[at], terms.rank, groups, head.key, head.usable);
    level.value = convolve(terms.value_convolutions[at], terms.rank, groups, head.value, head.usable);
  } else {
    std::vector<bool> present;
    for (const T mass : below->mass) present.push_back(mass > 0);
    level.key = convolve(terms.key_convolutions[at], terms.rank, groups, below->key, present);
    level.value = convolve(terms.value_convolutions[at], terms.rank, groups, below->value, present);
  }
  for (Index c = 0; c < rows; ++c) {
    const Index group = c / terms.rank;
    level.mass[static_cast<std::size_t>(c)] =
        static_cast<T>(count_usable(head, group * width, (group + 1) * width)) / static_cast<T>(terms.rank);
  }
  return level;
}

/// Whether group `other` is in the interaction list of `group`: no neighbour, but its parent is the parent's neighbour
/// or the parent itself. Causal: only groups before.
inline bool interacts(Index group, Index other, bool causal) {
  return std::abs(other / 2 - group / 2) <= 1 && std::abs(other - group) >= 2 && (!causal || other < group);
}

/// One softmax over the keys of query i's own block and the two beside it, and over the pooled keys of every level's
/// interaction list, each e^score times the pooled key's mass.
template <class T>
Matrix<T> multipole_head(const Head<T>& head, const MultipoleTerms<T>& terms) {
  std::vector<PooledLevel<T>> levels;
  std::vector<Matrix<T>> level_queries;
  for (Index l = 1; l <= multipole_levels(head.key.rows(), terms.block); ++l) {
    levels.push_back(pool_level(head, l, levels.empty() ? nullptr : &levels.back(), terms));
    const Index sub_block = levels.back().group_width / terms.rank;
    level_queries.push_back(sub_block_means(head, head.query, sub_block, levels.back().key.rows(), terms.all_queries));
  }

  const T scale = scale_or_default(head, terms.scale);
  Matrix<T> out(head.query.rows(), head.value.cols());
  for (Index i = 0; i < out.rows(); ++i) {
    std::vector<T> score, mass;
    Matrix<T> value(0, head.value.cols());
    const auto add = [&](T s, T m, const auto& v) {
      score.push_back(s);
      mass.push_back(m);
      value.conservativeResize(value.rows() + 1, Eigen::NoChange);
      value.bottomRows(1) = v;
    };
    for (Index j = 0; j < head.key.rows(); ++j) {
      const bool near = std::abs(j / terms.block - i / terms.block) <= 1;
      if (near && visible(head, visible_window(terms.causal), i, j)) {
        add(scale * head.query.row(i).dot(head.key.row(j)), T(1), head.value.row(j));
      }
    }
    for (std::size_t l = 0; l < levels.size(); ++l) {
      const PooledLevel<T>& level = levels[l];
      const Matrix<T> query = terms.pooled_queries
                                  ? Matrix<T>(level_queries[l].row(i / (level.group_width / terms.rank)))
                                  : Matrix<T>(head.query.row(i));
      for (Index c = 0; c < level.key.rows(); ++c) {
        const T tokens = level.mass[static_cast<std::size_t>(c)];
        if (tokens == 0 || !interacts(i / level.group_width, c / terms.rank, terms.causal)) continue;
        add(scale * query.row(0).dot(level.key.row(c)), terms.mass_scaling ? tokens : T(1), level.value.row(c));
      }
    }
    out.row(i) = weighted_sum(softmax_weights(score, mass), value);
  }
  return out;
}

template <class T>
Matrix<T> multipole(const Heads& heads, const Inputs<T>& inputs, const MultipoleTerms<T>& terms) {
  return each_head(heads, inputs, [&](const Head<T>& head) { return multipole_head(head, terms); });
}

}  // namespace reference
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
