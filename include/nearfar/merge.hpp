#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// Softmax attention of queries to some of their keys: what Softmax or Banded writes to out and saves.
///
///   out          n_q x (heads.query * value_dim)
///   log_sum_exp  heads.query x n_q, -infinity where a query saw none of the keys
template <class Scalar>
struct PartialAttention {
  Tokens<Scalar> out;
  Tokens<std::conditional_t<std::is_const_v<Scalar>, const double, double>> log_sum_exp = {};
};

namespace detail {

/// The names of a part's matrices, for errors.
struct PartNames {
  std::string_view out;
  std::string_view log_sum_exp;
};

template <class T>
void check_part(std::string_view function, const PartNames& names, const Heads& heads, const PartialAttention<T>& part,
                Index rows) {
  check_shape(function, names.out, part.out, rows, heads.out_cols(), "a.out", "the heads");
  check_head_rows(function, names.log_sum_exp, part.log_sum_exp, heads.query, rows);
}

/// Calls visit(row, head, columns) for every query and head; columns(tokens) are the head's features of the row.
template <class T, class Visit>
void for_each_head_row(Context& context, const Heads& heads, Index rows, Visit&& visit) {
  constexpr Index rows_a_task = 256;
  Work work(context);
  work.for_each(ceil_div(rows, rows_a_task), [&](Index task, Scratch&) {
    for (Index i = task * rows_a_task; i < std::min((task + 1) * rows_a_task, rows); ++i) {
      for (Index h = 0; h < heads.query; ++h) {
        const Index width = heads.value_width();
        visit(i, h, [i, h, width]<class S>(const Tokens<S>& tokens) {
          return RowArray<S>(tokens.row(i) + h * width, width);
        });
      }
    }
  });
}

}  // namespace detail

/// Attention to the keys of `a` and of `b` together, which have no key in common:
///
///   L_i = log(exp(L_ai) + exp(L_bi))        out_i = exp(L_ai - L_i) out_ai + exp(L_bi - L_i) out_bi
///
/// for each query i and head, L being the log-sum-exp: exactly what one pass over all keys gives, so that keys may be
/// divided among calls, machines or mechanisms (a cached prefix, blocks in a ring). Merging is associative.
///
///   merge<float>(heads, {out_a, saved_a.log_sum_exp}, {out_b, saved_b.log_sum_exp}, {out, log_sum_exp});
///
/// Time O(n_q heads.query value_dim), bound by memory; nothing is allocated. `merged` may be `a` or `b` itself. A part
/// that saw no key is not read: a query without any key in either gets a zero row and -infinity. Throws
/// std::invalid_argument if heads do not fit together or shapes disagree. Source: Milakov and Gimelshein, arXiv
/// 1805.02867.
template <class T>
void merge(const Heads& heads, const PartialAttention<const T>& a, const PartialAttention<const T>& b,
           const PartialAttention<T>& merged, Context& context = default_context()) {
  constexpr const char* name = "merge";
  detail::check_heads(name, heads);
  const Index rows = a.out.rows();
  detail::check_part(name, {"a.out", "a.log_sum_exp"}, heads, a, rows);
  detail::check_part(name, {"b.out", "b.log_sum_exp"}, heads, b, rows);
  detail::check_part(name, {"merged.out", "merged.log_sum_exp"}, heads, merged, rows);
  detail::for_each_head_row<T>(context, heads, rows, [&](Index i, Index h, auto&& columns) {
    const detail::MergeWeights weight(a.log_sum_exp(h, i), b.log_sum_exp(h, i));
    auto out = columns(merged.out);
    merged.log_sum_exp(h, i) = weight.log_sum_exp;
    if (weight.a != 0 && weight.b != 0) {
      out = static_cast<T>(weight.a) * columns(a.out) + static_cast<T>(weight.b) * columns(b.out);
    } else if (weight.a != 0) {
      out = columns(a.out);
    } else if (weight.b != 0) {
      out = columns(b.out);
    } else {
      out.setZero();
    }
  });
}

/// The gradients of both parts of `merge` from that of the merged result, with w_a = exp(L_a - L) and w_b likewise:
///
///   grad_out_a = w_a grad_out      grad_L_a = w_a grad_L + w_a w_b grad_out . (out_a - out_b)
///   grad_out_b = w_b grad_out      grad_L_b = w_b grad_L - w_a w_b grad_out . (out_a - out_b)
///
/// `grad_merged.log_sum_exp` may be left out where nothing depends on the merged log-sum-exp. Gradients are written;
/// those of a part that saw no key are zero. The backward pass of Softmax and Banded takes both gradients of a part.
template <class T>
void merge_backward(const Heads& heads, const PartialAttention<const T>& a, const PartialAttention<const T>& b,
                    const PartialAttention<const T>& grad_merged, const PartialAttention<T>& grad_a,
                    const PartialAttention<T>& grad_b, Context& context = default_context()) {
  constexpr const char* name = "merge_backward";
  detail::check_heads(name, heads);
  const Index rows = a.out.rows();
  const bool has_grad = grad_merged.log_sum_exp.rows() > 0;
  detail::check_part(name, {"a.out", "a.log_sum_exp"}, heads, a, rows);
  detail::check_part(name, {"b.out", "b.log_sum_exp"}, heads, b, rows);
  detail::check_part<const T>(name, {"grad_merged.out", "grad_merged.log_sum_exp"}, heads,
                              {grad_merged.out, has_grad ? grad_merged.log_sum_exp : a.log_sum_exp}, rows);
  detail::check_part(name, {"grad_a.out", "grad_a.log_sum_exp"}, heads, grad_a, rows);
  detail::check_part(name, {"grad_b.out", "grad_b.log_sum_exp"}, heads, grad_b, rows);
  detail::check_distinct<T>(name, "grad_a.out", grad_a.out, {{"grad_merged.out", grad_merged.out}});
  detail::check_distinct<T>(name, "grad_b.out", grad_b.out,
                            {{"grad_merged.out", grad_merged.out}, {"grad_a.out", grad_a.out}});
  detail::for_each_head_row<T>(context, heads, rows, [&](Index i, Index h, auto&& columns) {
    const detail::MergeWeights weight(a.log_sum_exp(h, i), b.log_sum_exp(h, i));
    const auto grad_out = columns(grad_merged.out);
    const double grad = has_grad ? grad_merged.log_sum_exp(h, i) : 0;
    double exchange = 0;
    if (weight.a != 0 && weight.b != 0) {
      exchange = weight.a * weight.b * static_cast<double>((grad_out * (columns(a.out) - columns(b.out))).sum());
    }
    const auto write = [&](double part, double sign, const PartialAttention<T>& to) {
      to.log_sum_exp(h, i) = part == 0 ? 0 : part * grad + sign * exchange;
      if (part == 0) {
        columns(to.out).setZero();
      } else {
        columns(to.out) = static_cast<T>(part) * grad_out;
      }
    };
    write(weight.a, 1, grad_a);
    write(weight.b, -1, grad_b);
  });
}

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
