#pragma once

#include <nearfar/engine/softmax/window_attention.hpp>
#include <nearfar/engine/softmax/window_backward.hpp>

#include <cmath>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The keys of each sequence cut into pieces of fixed length, so that few queries and many keys give enough tasks: a
/// packed batch in which every piece is a sequence of its own, with a copy of its sequence's queries.
class KeyPieces {
 public:
  template <class T>
  KeyPieces(Work& work, const Inputs<T>& inputs)
      : pieces_(
            work, sequence_count(inputs), [&](Index b) { return sequence(inputs, b).key_count; },
            [&](Index b) { return length(sequence(inputs, b)); }),
        query_offsets_(work.take<Index>(count() + 1)),
        key_offsets_(work.take<Index>(count() + 1)) {
    query_offsets_[0] = key_offsets_[0] = 0;
    for (Index p = 0; p < count(); ++p) {
      const Tile piece = pieces_[p];
      const Sequence rows = sequence(inputs, piece.sequence);
      query_offsets_[p + 1] = query_offsets_[p] + rows.query_count;
      key_offsets_[p + 1] = rows.key_begin + piece.first + piece.count;
    }
  }

  Index count() const { return pieces_.count(); }
  Range of(Index b) const { return pieces_.of(b); }

  /// All queries of all pieces.
  Index queries() const { return query_offsets_[count()]; }

  /// The first query of a piece.
  Index query_begin(Index piece) const { return query_offsets_[piece]; }

  List<Index> query_offsets() const { return {query_offsets_, static_cast<std::size_t>(count()) + 1}; }
  List<Index> key_offsets() const { return {key_offsets_, static_cast<std::size_t>(count()) + 1}; }

  /// A copy for each piece of the rows of its sequence's queries.
  template <class T>
  Tokens<T> repeat_rows(Work& work, const Inputs<T>& inputs, Tokens<const T> rows) const {
    const Tokens<T> repeated = take_rows<T>(work, queries(), rows.cols());
    for_each_piece(inputs, [&](const Sequence& s, Index first) {
      for (Index i = 0; i < s.query_count; ++i) {
        std::copy_n(rows.row(s.query_begin + i), rows.cols(), repeated.row(first + i));
      }
    });
    return repeated;
  }

  /// The same where queries stand in the columns.
  template <class T, class S>
  Tokens<S> repeat_cols(Work& work, const Inputs<T>& inputs, Tokens<const S> cols) const {
    const Tokens<S> repeated = take_rows<S>(work, cols.rows(), queries());
    for_each_piece(inputs, [&](const Sequence& s, Index first) {
      repeated.middle_cols(first, s.query_count).matrix() = cols.middle_cols(s.query_begin, s.query_count).matrix();
    });
    return repeated;
  }

  /// rows = the sums over the pieces of a sequence, in their order, of the rows that each has for its queries.
  template <class T>
  void sum_rows(const Inputs<T>& inputs, Tokens<const T> repeated, Tokens<T> rows) const {
    rows.matrix().setZero();
    for_each_piece(inputs, [&](const Sequence& s, Index first) {
      rows.middle_rows(s.query_begin, s.query_count).matrix() += repeated.middle_rows(first, s.query_count).matrix();
    });
  }

 private:
  template <class T, class Visit>
  void for_each_piece(const Inputs<T>& inputs, Visit&& visit) const {
    for (Index p = 0; p < count(); ++p) visit(sequence(inputs, pieces_[p].sequence), query_begin(p));
  }

  // The copies of queries and results come to at most a sixteenth of the keys and values.
  static Index length(const Sequence& rows) { return std::max<Index>(2048, 16 * rows.query_count); }

  Tiles pieces_;
  Index* query_offsets_;
  Index* key_offsets_;
};

/// Softmax attention of few queries to all of many keys, as wide_window_attention gives it: each piece of the keys for
/// itself, then merged in their order,
///
///   L_i = log sum_p exp(L_ip)      out_i = sum_p exp(L_ip - L_i) out_ip      over pieces p with log-sum-exp L_ip.
template <class T>
void split_key_attention(Work& work, const Heads& heads, double scale, const Inputs<T>& inputs, Tokens<T> out,
                         double* log_sum_exp) {
  const KeyPieces pieces(work, inputs);
  if (pieces.count() <= sequence_count(inputs)) {
    wide_window_attention(work, heads, Window{}, scale, inputs, out, log_sum_exp);
    return;
  }
  const Index rows = pieces.queries();
  const Tokens<T> partial = take_rows<T>(work, rows, heads.out_cols());
  double* partial_log_sum_exp = work.take<double>(heads.query * rows);
  const Tokens<const T> query = pieces.repeat_rows(work, inputs, inputs.query);
  const Inputs<T> packed{
      query, inputs.key, inputs.value, inputs.key_mask, pieces.query_offsets(), pieces.key_offsets()};
  wide_window_attention(work, heads, Window{}, scale, packed, partial, partial_log_sum_exp);

  const Index dim = heads.value_width();
  work.for_each(sequence_count(inputs) * heads.query, [&](Index task, Scratch&) {
    const Index b = task / heads.query;
    const Index head = task % heads.query;
    const Sequence s = sequence(inputs, b);
    for (Index i = 0; i < s.query_count; ++i) {
      double total = -infinity<double>;
      T* const merged = out.row(s.query_begin + i) + head * dim;
      std::fill_n(merged, dim, T(0));
      for (Index p = pieces.of(b).first; p < pieces.of(b).end; ++p) {
        const Index row = pieces.query_begin(p) + i;
        const MergeWeights weight(total, partial_log_sum_exp[head * rows + row]);
        const T* const part = partial.row(row) + head * dim;
        for (Index c = 0; c < dim; ++c) merged[c] = T(weight.a) * merged[c] + T(weight.b) * part[c];
        total = weight.log_sum_exp;
      }
      log_sum_exp[head * inputs.query.rows() + s.query_begin + i] = total;
    }
  });
}

/// The backward pass of split_key_attention, with its out and log-sum-exp: a piece takes its weights again from the
/// log-sum-exp over all pieces, and the gradients of the queries are summed over the pieces.
template <class T>
void split_keys_backward(Work& work, const Heads& heads, double scale, const Inputs<T>& inputs, Tokens<const T> out,
                         const double* log_sum_exp, Tokens<const T> grad_out, const InputGradients<T>& gradients) {
  const Index queries = inputs.query.rows();
  const KeyPieces pieces(work, inputs);
  T* delta = work.take<T>(heads.query * queries);
  softmax_delta(work, heads, out, grad_out, delta);
  if (pieces.count() <= sequence_count(inputs)) {
    wide_window_backward(work, heads, Window{}, scale, inputs, log_sum_exp, grad_out, delta, gradients);
    return;
  }
  const auto repeat = [&]<class S>(const S* of_queries) {
    return pieces.repeat_cols(work, inputs, Tokens<const S>(of_queries, heads.query, queries, queries)).data();
  };
  const Index rows = pieces.queries();
  const Tokens<T> partial = take_rows<T>(work, rows, heads.query_cols());
  const Tokens<const T> query = pieces.repeat_rows(work, inputs, inputs.query);
  const Inputs<T> packed{
      query, inputs.key, inputs.value, inputs.key_mask, pieces.query_offsets(), pieces.key_offsets()};
  wide_window_backward(work, heads, Window{}, scale, packed, repeat(log_sum_exp),
                       Tokens<const T>(pieces.repeat_rows(work, inputs, grad_out)), repeat(delta),
                       {partial, gradients.key, gradients.value});
  pieces.sum_rows(inputs, Tokens<const T>(partial), gradients.query);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
