#pragma once

#include <nearfar/detail/checks.hpp>
#include <nearfar/engine/landmarks.hpp>
#include <nearfar/engine/pseudo_inverse.hpp>
#include <nearfar/engine/split_keys.hpp>
#include <nearfar/engine/window_attention.hpp>

#include <optional>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct NystromOptions {
  /// How many segments a sequence is cut into; each has one landmark query and one landmark key.
  Index landmarks = 64;
  /// What query . key is multiplied by; 1 / sqrt(dim) unless given.
  std::optional<double> scale = {};
  /// Pivots of the kernel up to this share of the first count as zero; landmarks times the rounding unit of T unless
  /// given.
  std::optional<double> tolerance = {};
};

/// Far-field attention of low rank: every query sees the sequence through a few landmarks.
///
///   out = softmax(scale * q Kl^T) A^+ softmax(scale * Ql k^T) v,    A = softmax(scale * Ql Kl^T)       for each head
///
/// Ql and Kl (landmarks x dim) are the means of the queries and keys of each segment; segment t of r holds the tokens
/// floor(t n / r) .. floor((t + 1) n / r) - 1. A^+ is the Moore-Penrose inverse itself, in double precision, where the
/// authors' code iterates towards it; the kernel A of a smooth sequence is close to singular, and an error of B =
/// softmax(Ql k^T) v may grow by its condition number: that is the mechanism's, whatever computes it.
///
/// Shapes as Softmax with n_q = n_k = n, bidirectional alone. Time: 4 n r (dim + value_dim) multiply-adds' flops a
/// head, and of order r^3 for A^+. Memory beside inputs and out: the landmarks, r^2 numbers a head, and for every 2048
/// tokens r rows of partial results; a second call of the same shapes allocates nothing.
/// Masked tokens enter no mean and no softmax over keys, but have a row of out as queries; a segment without any other
/// token has no landmark. So a sequence of fewer tokens than `landmarks` has one landmark a token, which makes the
/// result exact attention. Where all keys are masked out is zero, and the log-sum-exp -infinity.
/// Source: Xiong et al., Nystromformer, arXiv 2102.03902, equations 13 and 14 and algorithm 1.
template <class T>
class Nystrom {
 public:
  using Scalar = T;
  using Options = NystromOptions;
  using Parameters = NoParameters;

  /// Ql and Kl, one row a landmark, the landmarks of a packed batch one sequence after another; Kl once for each query
  /// head. B = softmax(scale * Ql k^T) v with the log-sum-exp of its rows (heads.query x landmarks); W = A^+ B; and
  /// A^+ of each sequence and head: rows as the sequence's landmarks, columns from head * options.landmarks on.
  /// log_sum_exp: heads.query x n, of the scores against Kl.
  struct Saved {
    Matrix<T> landmark_query;
    Matrix<T> landmark_key;
    Matrix<T> landmark_out;
    Matrix<T> landmark_log_sum_exp;
    Matrix<T> landmark_value;
    Matrix<double> inverse;
    Matrix<T> log_sum_exp;
  };

  explicit Nystrom(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_scale(name, options.scale);
    detail::require(options.landmarks >= 1, name, "landmarks must be at least 1, but is ", options.landmarks, ".");
    detail::require(!options.tolerance || (*options.tolerance >= 0 && *options.tolerance < 1), name,
                    "tolerance must be 0 or more and less than 1, but is ", options.tolerance.value_or(0), ".");
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    detail::Work work(context);
    const detail::Landmarks landmarks(work, inputs, options_.landmarks);
    const Index rows = landmarks.count();
    const auto take = [&](Index cols) { return Tokens<T>(work.take<T>(rows * cols), rows, cols, cols); };
    const Index dims = heads_.query_cols(), value_dims = heads_.out_cols();
    attend(
        work, inputs, out, landmarks,
        {take(dims), take(dims), take(value_dims), work.take<T>(heads_.query * rows), take(value_dims), {}, nullptr});
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    detail::Work work(context);
    const detail::Landmarks landmarks(work, inputs, options_.landmarks);
    const Index rows = landmarks.count();
    saved.landmark_query.resize(rows, heads_.query_cols());
    saved.landmark_key.resize(rows, heads_.query_cols());
    saved.landmark_out.resize(rows, heads_.out_cols());
    saved.landmark_log_sum_exp.resize(heads_.query, rows);
    saved.landmark_value.resize(rows, heads_.out_cols());
    saved.inverse.resize(rows, heads_.query * options_.landmarks);
    saved.log_sum_exp.resize(heads_.query, inputs.query.rows());
    attend(work, inputs, out, landmarks,
           {saved.landmark_query, saved.landmark_key, saved.landmark_out, saved.landmark_log_sum_exp.data(),
            saved.landmark_value, Tokens<double>(saved.inverse), saved.log_sum_exp.data()});
  }

 private:
  static constexpr const char* name = "Nystrom";

  /// What stands between inputs and out, as in Saved; the last two may be null.
  struct Factors {
    Tokens<T> query;
    Tokens<T> key;
    Tokens<T> out;
    T* out_log_sum_exp;
    Tokens<T> value;
    Tokens<double> inverse;
    T* log_sum_exp;
  };

  using Square = Eigen::Map<Matrix<double>>;

  double scale() const { return detail::scale_or_default(options_.scale, heads_); }

  double tolerance() const {
    return options_.tolerance.value_or(static_cast<double>(options_.landmarks) * std::numeric_limits<T>::epsilon());
  }

  void attend(detail::Work& work, const Inputs<T>& inputs, Tokens<T> out, const detail::Landmarks& landmarks,
              const Factors& f) const {
    landmarks.average(work, inputs.query, heads_.dim, 1, f.query);
    landmarks.average(work, inputs.key, heads_.dim, heads_.group(), f.key);
    detail::split_key_attention(work, heads_, scale(), landmarks.as_queries(inputs, Tokens<const T>(f.query)), f.out,
                                f.out_log_sum_exp);
    work.for_each(sequence_count(inputs) * heads_.query, [&](Index task, detail::Scratch& scratch) {
      solve(landmarks.of(task / heads_.query), task % heads_.query, f, scratch);
    });
    const Heads heads{heads_.query, heads_.query, heads_.dim, heads_.value_width()};
    detail::window_attention(work, heads, Window{}, scale(),
                             landmarks.as_keys(inputs, Tokens<const T>(f.key), Tokens<const T>(f.value)), out,
                             f.log_sum_exp);
  }

  // W = A^+ B of one sequence and head.
  void solve(Range landmarks, Index head, const Factors& f, detail::Scratch& scratch) const {
    const Index count = landmarks.count(), value_dim = heads_.value_width();
    const auto share = [&](const auto& tokens, Index cols, Index width) {
      return tokens.middle_rows(landmarks.first, count).middle_cols(head * cols, width).matrix();
    };
    const auto take = [&](Index cols) { return Square(scratch.take<double>(count * cols), count, cols); };
    Square inverse = take(count), out = take(value_dim), value = take(value_dim);
    kernel(share(f.query, heads_.dim, heads_.dim), share(f.key, heads_.dim, heads_.dim), inverse, scratch);
    detail::pseudo_invert(inverse, tolerance(), scratch);
    out = share(f.out, value_dim, value_dim).template cast<double>();
    value = inverse.lazyProduct(out);
    share(f.value, value_dim, value_dim) = value.template cast<T>();
    if (f.inverse.data() != nullptr) share(f.inverse, options_.landmarks, count) = inverse;
  }

  // A = softmax(scale * Ql Kl^T) of one sequence and head.
  template <class Landmark>
  void kernel(const Landmark& query, const Landmark& key, Square a, detail::Scratch& scratch) const {
    Square q(scratch.take<double>(query.size()), query.rows(), query.cols());
    Square k_transposed(scratch.take<double>(key.size()), key.cols(), key.rows());
    q = query.template cast<double>() * scale();
    k_transposed = key.transpose().template cast<double>();
    a = q.lazyProduct(k_transposed);
    for (Index i = 0; i < a.rows(); ++i) {
      auto row = a.row(i).array();
      row = (row - row.maxCoeff()).exp();
      row /= row.sum();
    }
  }

  Heads heads_;
  Options options_;
  [[no_unique_address]] Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
