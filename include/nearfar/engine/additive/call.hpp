#pragma once

#include <nearfar/context.hpp>
#include <nearfar/detail/stores.hpp>
#include <nearfar/engine/additive/packed_matrix.hpp>
#include <nearfar/engine/additive/softmax_pooling.hpp>
#include <nearfar/engine/additive/stretches.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// What the forward pass of additive attention keeps for the backward pass. Weights have a row a token, as many columns
/// as heads (padded), and are zero where the token is masked.
template <class T>
struct AdditiveSaved {
  Matrix<T> query_weights;  ///< alpha; causal: alpha of each token in the softmax that ends with it
  Matrix<T> key_weights;    ///< beta, likewise
  Matrix<T> query_means;    ///< gq of each sequence; causal: before each stretch
  Matrix<T> key_means;      ///< sum_i beta_i k_i of each sequence; causal: gk before each stretch
};

/// One call of additive attention: what its tasks share.
template <class T>
struct AdditiveCall {
  const Inputs<T>& inputs;
  Heads heads;
  bool per_head_weights;  ///< whether a head's score sees its own features alone
  bool add_query;
  const T* w_q;  ///< as pooling wants it: times scale and log2 e, a row a head (padded) over all heads' features
  const T* w_k;
  Stretches stretches;
  Work& work;

  Index width() const { return heads.query_cols(); }
  PoolingShape query_shape() const { return {heads.query, heads.dim, 1, per_head_weights}; }
  PoolingShape key_shape() const { return {heads.query, heads.dim, heads.group(), per_head_weights}; }

  /// What the thread that goes through stretch s likely goes through next; no tokens if nothing.
  Stretch after(Index s) const {
    const Index next = work.likely_next(s);
    return next < stretches.count() ? stretches[next] : Stretch{};
  }

  bool sees(Index token) const {
    return inputs.key_mask.empty() || inputs.key_mask[static_cast<std::size_t>(token)] != 0;
  }
};

/// What the backward pass reads and writes beside the inputs.
template <class T>
struct AdditiveGradients {
  const AdditiveSaved<T>& saved;
  Tokens<const T> out;
  Tokens<const T> u;  ///< of u_i; with the transform it waits in the rows of query until they are written
  InputGradients<T> inputs;
  Tokens<T> w_q;  ///< of the packed weights, written
  Tokens<T> w_k;
  Tokens<T> w_t = {};  ///< added to; empty without the transform
  T* b_t = nullptr;    ///< added to; null without bias
};

/// u = gk * v + q feature by feature, each key/value head serving its group of query heads; gk or q may be null (zero).
template <class T>
NEARFAR_INLINE void blend_row(const Heads& heads, const T* global_key, const T* value, const T* query, T* u,
                              KeepOrPastCaches store = {}) {
  const Index group = heads.group();
  const Index slices = group == 1 ? 1 : heads.query;
  const Index length = heads.query_cols() / slices;
  // One loop for each case: the inner loop has no time for questions.
  const auto for_each = [&](auto&& blend) {
    for (Index s = 0; s < slices; ++s) {
      for_each_packet<T>(length, [=, column = s * length, shared = s / group * length](auto by, Index c) {
        using P = typename decltype(by)::template Of<T>;
        store(u + column + c, blend(pset1<P>(T(0)), column + c, shared + c));
      });
    }
  };
  if (global_key == nullptr && query == nullptr) {
    for_each([](const auto& zero, Index, Index) { return zero; });
  } else if (global_key == nullptr) {
    for_each([=]<class P>(const P&, Index c, Index) { return ploadu<P>(query + c); });
  } else if (query == nullptr) {
    for_each([=]<class P>(const P&, Index c, Index shared) {
      return pmul(ploadu<P>(global_key + c), ploadu<P>(value + shared));
    });
  } else {
    for_each([=]<class P>(const P&, Index c, Index shared) {
      return pmadd(ploadu<P>(global_key + c), ploadu<P>(value + shared), ploadu<P>(query + c));
    });
  }
}

/// The gradient of u = gk * v: grad_v = gk * grad_u, summed over the query heads of a group, taken by `store`, and
/// grad_gk = grad_u * v, added to what is there or written.
template <class T>
void blend_row_backward(const Heads& heads, const T* global_key, const T* value, const T* grad_u, T* grad_value,
                        bool add, T* grad_global_key, KeepOrPastCaches store = {}) {
  const Index group = heads.group();
  const Index dim = heads.dim;
  for (Index g = 0; g < heads.key_value; ++g, value += dim, grad_value += dim) {
    for (Index h = g * group; h < (g + 1) * group; ++h, global_key += dim, grad_u += dim, grad_global_key += dim) {
      for_each_packet<T>(dim, [=](auto by, Index c) {
        using P = typename decltype(by)::template Of<T>;
        const P grad = ploadu<P>(grad_u + c);
        const P product = pmul(grad, ploadu<P>(value + c));
        pstoreu(grad_global_key + c, add ? P(padd(product, ploadu<P>(grad_global_key + c))) : product);
        const P own = pmul(grad, ploadu<P>(global_key + c));
        // The sum over a group is read again before it is done.
        if (group == 1) {
          store(grad_value + c, own);
        } else {
          pstoreu(grad_value + c, h == g * group ? own : P(padd(own, ploadu<P>(grad_value + c))));
        }
      });
    }
  }
}

/// Rows that go through the transform together: their u stay in the cache.
inline constexpr Index transform_rows = 128;

/// Room for `count` of them, and zeros behind them up to whole groups.
template <class T>
Tokens<T> take_transform_rows(Scratch& scratch, Index count, Index width) {
  const Index room = round_up(count, PackedMatrix<T>::rows_at_once);
  const Tokens<T> rows(scratch.take<T>(room * width), count, width, width);
  std::fill_n(rows.row(count), (room - count) * width, T(0));
  return rows;
}

/// Where the rows of out go: out_i = w_t u_i + b_t + q_i, u_i = gk_i * v_i.
template <class T>
struct AdditiveOut {
  Tokens<T> rows;
  bool transform;
  PackedMatrix<T> w_t = {};           ///< transposed
  const T* b_t = nullptr;             ///< null: no bias
  AdditiveSaved<T>* saved = nullptr;  ///< null: nothing is kept
};

/// Writes the rows of out of the tokens [first, first + count), at most transform_rows. global_key(token), asked for in
/// turn, is null where no token is seen: then the value is not read.
template <class T>
void write_rows(const AdditiveCall<T>& call, const AdditiveOut<T>& out, Index first, Index count, Scratch& scratch,
                FunctionRef<const T*(Index)> global_key) {
  const Scratch::Scope scope(scratch);
  const Index width = call.width();
  const Tokens<T> rows = out.rows.middle_rows(first, count);
  const Tokens<T> u = out.transform ? take_transform_rows<T>(scratch, count, width) : rows;
  const bool add_query = call.add_query && !out.transform;
  const T* const none = nullptr;
  const auto blend = [&](auto store) {
    for (Index i = 0; i < count; ++i) {
      const Index token = first + i;
      blend_row<T>(call.heads, global_key(token), call.inputs.value.row(token),
                   add_query ? call.inputs.query.row(token) : none, u.row(i), store);
    }
  };
  out.transform ? blend(KeepOrPastCaches{}) : with_store(rows_past_caches(out.rows, call.heads.dim), blend);
  if (!out.transform) return;
  for (Index i = 0; i < count; ++i) {
    T* const row = rows.row(i);
    if (call.add_query) {
      std::copy_n(call.inputs.query.row(first + i), width, row);
    } else {
      std::fill_n(row, width, T(0));
    }
    if (out.b_t == nullptr) continue;
    add_row(width, row, out.b_t);
  }
  out.w_t.multiply_add({u.data(), width, 1}, rows);
}

/// Whether the backward pass may read a token's value: not where the token is masked and its row of out has no
/// gradient.
template <class T>
bool reads_value(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, Index token) {
  if (call.sees(token)) return true;
  const T* const row = grad.out.row(token);
  return std::any_of(row, row + call.width(), [](T x) { return x != T(0); });
}

/// The gradient of u for all tokens, grad_out w_t, into `rows`. `w_t` is packed as it stands.
template <class T>
void transform_backward(const AdditiveCall<T>& call, Tokens<const T> grad_out, const PackedMatrix<T>& w_t,
                        Tokens<T> rows) {
  const Index width = call.width();
  call.work.for_each(call.stretches.count(), [&](Index s, Scratch& scratch) {
    const Stretch stretch = call.stretches[s];
    for (Index first = stretch.first; first < stretch.end(); first += transform_rows) {
      const Scratch::Scope scope(scratch);
      const Tokens<T> block = rows.middle_rows(first, std::min(transform_rows, stretch.end() - first));
      const Tokens<T> copy = take_transform_rows<T>(scratch, block.rows(), width);
      for (Index i = 0; i < block.rows(); ++i) {
        std::copy_n(grad_out.row(first + i), width, copy.row(i));
        std::fill_n(block.row(i), width, T(0));
      }
      w_t.multiply_add({copy.data(), width, 1}, block);
    }
  });
}

/// The gradients of the transform itself: adds grad_out^T u to w_t's and the column sums of grad_out to b_t's. Each
/// task owns some columns and goes through all tokens; write_u(token, stretch, first, count, to) gives those columns of
/// u.
template <class T, class WriteU>
void transform_weights_backward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, WriteU&& write_u) {
  constexpr int vectors = PackedMatrix<T>::vectors;
  constexpr Index panel = PackedMatrix<T>::width;
  constexpr Index columns = panel * std::max<Index>(1, 128 / panel);
  const Index width = call.width();
  call.work.for_each(ceil_div(width, columns), [&](Index task, Scratch& scratch) {
    const Index first_column = task * columns;
    const Index mine = std::min(columns, width - first_column);
    T* const u = scratch.take<T>(transform_rows * columns);
    std::fill_n(u, transform_rows * columns, T(0));
    for (Index s = 0; s < call.stretches.count(); ++s) {
      const Stretch stretch = call.stretches[s];
      for (Index first = stretch.first; first < stretch.end(); first += transform_rows) {
        const Index count = std::min(transform_rows, stretch.end() - first);
        for (Index i = 0; i < count; ++i) {
          write_u(first + i, stretch, first_column, mine, u + i * columns);
          if (grad.b_t == nullptr) continue;
          const T* const row = grad.out.row(first + i) + first_column;
          for (Index c = 0; c < mine; ++c) grad.b_t[first_column + c] += row[c];
        }
        for (Index c = 0; c < mine; c += panel) {
          multiply<vectors>(
              Broadcast<T>{grad.out.row(first), 1, grad.out.stride()}, width, u + c, columns, count,
              [](Index, int) { return pset1<Packet<T>>(T(0)); },
              [&](Index r, int v, const Packet<T>& sum) {
                const Index at = c + v * lanes<T>;
                add_numbers(grad.w_t.row(r) + first_column + at, mine - at, sum);
              });
        }
      }
    }
  });
}

/// Sums `count` parts of the gradients of score weights in their order, each a padded heads x width matrix.
template <class T>
void sum_weight_gradients(const AdditiveCall<T>& call, const T* parts, Index count, Tokens<T> sum) {
  const Index size = call.query_shape().padded() * call.width();
  call.work.for_each(call.heads.query, [&](Index h, Scratch&) {
    std::fill_n(sum.row(h), call.width(), T(0));
    for (Index s = 0; s < count; ++s) {
      const T* const part = parts + s * size + h * call.width();
      for (Index c = 0; c < call.width(); ++c) sum(h, c) += part[c];
    }
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
