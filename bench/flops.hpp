#pragma once

#include <nearfar/additive.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdlib>

// The work that each row is credited with: what the mathematics needs, not what an implementation happens to do.
//
//   softmax, banded   4 d a head and visible pair: 2 d for the score, 2 d for the weighted value
//   multipole         the same, a pooled vector counting as one key; with pooled queries a mean query as one query
//   linear            4 d d a head, token and feature map, when causal also 4 d a pair inside a chunk of 64
//   nystrom           8 r d a head and token: its scores with r landmarks as query and as key, and two weighted sums
//   fmm               the sum of its parts
//   additive          2 a feature and head that it scores for each of two scores, 2 for each mean and for out, 2 D for
//                     the transform; but its bytes matter: query twice (causal: once), key, value and out once
//   backward          2.5 times forward; additive's bytes: query, key, value and out's gradient (bidirectional: twice)
//                     read, three gradients written
//
// Exponentials, normalisations, pooling and anything of size r^3 are not counted.
namespace bench {

using nearfar::Index;

/// What one call does: the rows of its output, its flops, and the bytes that it cannot avoid to move.
struct Cost {
  double tokens = 0;
  double flops = 0;
  double bytes = 0;
};

inline double real(Index count) { return static_cast<double>(count); }

/// Each of query, key, value and out once.
inline double bytes_of_tensors(const nearfar::Heads& heads, Index queries, Index keys, std::size_t scalar) {
  return static_cast<double>(scalar) * (real(queries) * real(heads.query_cols() + heads.out_cols()) +
                                        real(keys) * real(heads.key_cols() + heads.value_cols()));
}

inline double visible_pairs(nearfar::Window window, Index queries, Index keys) {
  const nearfar::Band band(window, queries, keys);
  double pairs = 0;
  for (Index i = 0; i < queries; ++i) pairs += real(std::max<Index>(band.end(i) - band.first(i), 0));
  return pairs;
}

inline double flops_of_pairs(const nearfar::Heads& heads, double pairs) {
  return 2.0 * real(heads.query) * real(heads.dim + heads.value_width()) * pairs;
}

inline double flops_of_window(const nearfar::Heads& heads, nearfar::Window window, Index n) {
  return flops_of_pairs(heads, visible_pairs(window, n, n));
}

inline double flops_of_linear(const nearfar::Heads& heads, Index n, Index maps, bool causal) {
  constexpr Index chunk = 64;
  const double state = 4.0 * real(heads.query * heads.dim * heads.value_width()) * real(n);
  const double own = causal ? flops_of_pairs(heads, real(n) * real(chunk + 1) / 2) : 0.0;
  return real(maps) * (state + own);
}

inline double flops_of_nystrom(const nearfar::Heads& heads, Index n, Index landmarks) {
  return 8.0 * real(heads.query * heads.dim * landmarks) * real(n);
}

inline double flops_of_additive(const nearfar::Heads& heads, Index n, const nearfar::AdditiveOptions& options) {
  const double width = real(heads.query_cols());
  const double scoring_heads = options.per_head_weights ? 1 : real(heads.query);
  return real(n) * width * (4 * scoring_heads + 6 + (options.transform ? 2 * width : 0));
}

/// The pairs of query and column of multipole attention: near tokens, and the pooled vectors of the groups at each
/// level that are neighbours of a parent but not of the group itself.
inline double multipole_pairs(Index n, Index block, Index rank, bool causal, bool pooled_queries) {
  double pairs = 0;
  for (Index first = 0; first < n; first += block) {
    const Index from = std::max<Index>(first - block, 0);
    const Index end = std::min(first + block, n);
    for (Index i = first; i < end; ++i) pairs += real((causal ? i + 1 : std::min(end + block, n)) - from);
  }
  for (Index width = block; 2 * width < n; width *= 2) {
    const Index sub = width / rank;
    for (Index group = 0; group * width < n; ++group) {
      const Index tokens = std::min(width, n - group * width);
      const Index queries = pooled_queries ? (tokens + sub - 1) / sub : tokens;
      const Index first = std::max<Index>((group / 2 - 1) * 2, 0);
      const Index end = causal ? group : (group / 2 + 2) * 2;
      for (Index other = first; other < end && other * width < n; ++other) {
        if (std::abs(other - group) < 2) continue;
        const Index columns = (std::min(width, n - other * width) + sub - 1) / sub;
        pairs += real(queries) * real(columns);
      }
    }
  }
  return pairs;
}

}  // namespace bench
