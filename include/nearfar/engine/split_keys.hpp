#pragma once

#include <nearfar/engine/window_attention.hpp>

#include <cmath>
#include <span>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The keys of each sequence cut into pieces of fixed length, so that few queries and many keys give enough tasks: a
/// packed batch in which every piece is a sequence of its own, with a copy of its sequence's queries.
class KeyPieces {
 public:
  template <class T>
  KeyPieces(Work& work, const Inputs<T>& inputs) : sequences_(sequence_count(inputs)) {
    first_piece_ = work.take<Index>(sequences_ + 1);
    first_piece_[0] = 0;
    for (Index b = 0; b < sequences_; ++b) {
      const Sequence rows = sequence(inputs, b);
      first_piece_[b + 1] = first_piece_[b] + std::max<Index>(1, (rows.key_count + length(rows) - 1) / length(rows));
    }
    query_offsets_ = work.take<Index>(count() + 1);
    key_offsets_ = work.take<Index>(count() + 1);
    query_offsets_[0] = key_offsets_[0] = 0;
    for (Index b = 0; b < sequences_; ++b) {
      const Sequence rows = sequence(inputs, b);
      for (Index p = first_piece_[b]; p < first_piece_[b + 1]; ++p) {
        const Index keys = std::min((p + 1 - first_piece_[b]) * length(rows), rows.key_count);
        query_offsets_[p + 1] = query_offsets_[p] + rows.query_count;
        key_offsets_[p + 1] = rows.key_begin + keys;
      }
    }
  }

  Index count() const { return first_piece_[sequences_]; }
  Range of(Index b) const { return {first_piece_[b], first_piece_[b + 1]}; }

  /// All queries of all pieces.
  Index queries() const { return query_offsets_[count()]; }

  /// The first query of a piece.
  Index query_begin(Index piece) const { return query_offsets_[piece]; }

  std::span<const Index> query_offsets() const { return {query_offsets_, static_cast<std::size_t>(count()) + 1}; }
  std::span<const Index> key_offsets() const { return {key_offsets_, static_cast<std::size_t>(count()) + 1}; }

  /// Copies the rows of each sequence's queries to each of its pieces.
  template <class T>
  void repeat(const Inputs<T>& inputs, Tokens<const T> rows, Tokens<T> repeated) const {
    for (Index b = 0; b < sequences_; ++b) {
      const Sequence s = sequence(inputs, b);
      for (Index p = of(b).first; p < of(b).end; ++p) {
        repeated.middle_rows(query_begin(p), s.query_count).matrix() =
            rows.middle_rows(s.query_begin, s.query_count).matrix();
      }
    }
  }

 private:
  // The copies of queries and results come to at most a sixteenth of the keys and values.
  static Index length(const Sequence& rows) { return std::max<Index>(2048, 16 * rows.query_count); }

  Index sequences_;
  Index* first_piece_;
  Index* query_offsets_;
  Index* key_offsets_;
};

/// Softmax attention of few queries to all of many keys, as window_attention gives it: each piece of the keys for
/// itself, then merged in their order,
///
///   L_i = log sum_p exp(L_ip)      out_i = sum_p exp(L_ip - L_i) out_ip      over pieces p with log-sum-exp L_ip.
template <class T>
void split_key_attention(Work& work, const Heads& heads, double scale, const Inputs<T>& inputs, Tokens<T> out,
                         T* log_sum_exp) {
  const KeyPieces pieces(work, inputs);
  if (pieces.count() == sequence_count(inputs)) {
    window_attention(work, heads, Window{}, scale, inputs, out, log_sum_exp);
    return;
  }
  const Index rows = pieces.queries();
  const auto take = [&](Index cols) { return Tokens<T>(work.take<T>(rows * cols), rows, cols, cols); };
  const Tokens<T> query = take(heads.query_cols());
  const Tokens<T> partial = take(heads.out_cols());
  T* partial_log_sum_exp = work.take<T>(heads.query * rows);
  pieces.repeat(inputs, inputs.query, query);
  const Inputs<T> packed{
      query, inputs.key, inputs.value, inputs.key_mask, pieces.query_offsets(), pieces.key_offsets()};
  window_attention(work, heads, Window{}, scale, packed, partial, partial_log_sum_exp);

  const Index dim = heads.value_width();
  work.for_each(sequence_count(inputs) * heads.query, [&](Index task, Scratch&) {
    const Index b = task / heads.query;
    const Index head = task % heads.query;
    const Sequence s = sequence(inputs, b);
    for (Index i = 0; i < s.query_count; ++i) {
      const auto piece = [&](Index p) { return pieces.query_begin(p) + i; };
      const auto piece_log_sum_exp = [&](Index p) { return partial_log_sum_exp[head * rows + piece(p)]; };
      T largest = -infinity<T>;
      for (Index p = pieces.of(b).first; p < pieces.of(b).end; ++p) largest = std::max(largest, piece_log_sum_exp(p));
      const T shift = largest == -infinity<T> ? T(0) : largest;
      T sum = 0;
      auto merged = out.middle_cols(head * dim, dim).matrix().row(s.query_begin + i);
      merged.setZero();
      for (Index p = pieces.of(b).first; p < pieces.of(b).end; ++p) {
        const T weight = std::exp(piece_log_sum_exp(p) - shift);
        sum += weight;
        merged += weight * partial.middle_cols(head * dim, dim).matrix().row(piece(p));
      }
      if (sum > T(0)) merged /= sum;
      log_sum_exp[head * inputs.query.rows() + s.query_begin + i] = shift + std::log(sum);
    }
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
