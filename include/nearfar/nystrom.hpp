#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/engine/nystrom/iterated_inverse.hpp>
#include <nearfar/engine/nystrom/landmarks.hpp>
#include <nearfar/engine/nystrom/pseudo_inverse.hpp>
#include <nearfar/engine/nystrom/split_keys.hpp>
#include <nearfar/engine/softmax/window_attention.hpp>

#include <limits>
#include <optional>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct NystromOptions {
  /// How many segments a sequence is cut into; each has one landmark query and one landmark key.
  Index landmarks = 64;
  /// What query . key is multiplied by; 1 / sqrt(dim) unless given.
  std::optional<double> scale = {};
  /// Pivots of the kernel up to this share of the first count as zero; its size times the machine epsilon of T unless
  /// given, which is the inverse as the equation has it. To train, give more, such as 0.1: where queries and keys are
  /// alike still, A is close to singular, and its inverse drowns what the values say.
  std::optional<double> tolerance = {};
  /// Takes as many steps of the authors' iteration towards A^-1 (they take 6) in place of A^+: what a model trained
  /// with their code needs. Few steps are themselves an inverse that small singular values do not drown.
  std::optional<Index> iterations = {};
};

/// Far-field attention of low rank: every query sees the sequence through a few landmarks.
///
///   out = softmax(scale * q Kl^T) A^+ softmax(scale * Ql k^T) v,    A = softmax(scale * Ql Kl^T)       for each head
///
/// Ql and Kl (landmarks x dim) are the means of the queries and keys of each segment; segment t of r holds the tokens
/// floor(t n / r) .. floor((t + 1) n / r) - 1. A^+ is the Moore-Penrose inverse itself, in double precision, unless
/// `iterations` are given; the kernel A of a smooth sequence is close to singular, and an error of B =
/// softmax(Ql k^T) v may grow by its condition number: that is the mechanism's, whatever computes it.
///
/// Shapes as Softmax with n_q = n_k = n, bidirectional alone. Time: 4 n r (dim + value_dim) flops a head, and of order
/// r^3 for A^+ (4 r^3 multiply-adds an iteration). Memory beside inputs and out: the landmarks; for every 2048 tokens
/// (or 16 r, where these are more) r rows of queries and r of partial results; and a thread a few times r^2 doubles,
/// twice as many for each of `iterations`. A second call of the same shapes and masks allocates nothing. Masked tokens
/// enter no mean and no softmax over keys, but have a row of out as queries; a segment without any other token has no
/// landmark. So a sequence of fewer tokens than `landmarks` has one landmark a token, which makes the result exact
/// attention, unless `tolerance` or `iterations` are given; the rows of masked tokens only if A is regular. Where all
/// keys are masked out is zero, and the log-sum-exp -infinity. Where pivots were dropped, the gradient is that of the
/// kernel without them.
/// Source: Xiong et al., Nystromformer, arXiv 2102.03902, algorithm 1.
template <class T>
class Nystrom {
 public:
  using Scalar = T;
  using Options = NystromOptions;
  using Parameters = NoParameters;

  /// Ql and Kl, one row a landmark, the landmarks of a packed batch one sequence after another; Kl once for each query
  /// head. B = softmax(scale * Ql k^T) v with the log-sum-exp of its rows (heads.query x landmarks); W = A^+ B; and
  /// A^+ of each sequence and head: rows as the sequence's landmarks, columns from head * m on, where no sequence has
  /// more than m landmarks.
  /// log_sum_exp: heads.query x n, of the scores against Kl.
  struct Saved {
    Matrix<T> landmark_query;
    Matrix<T> landmark_key;
    Matrix<T> landmark_out;
    Matrix<double> landmark_log_sum_exp;
    Matrix<T> landmark_value;
    Matrix<double> inverse;
    Matrix<double> log_sum_exp;
  };

  explicit Nystrom(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_scale<T>(name, options.scale);
    detail::require(options.landmarks >= 1, name, "landmarks must be at least 1, but is ", options.landmarks, ".");
    detail::require(!options.tolerance || (*options.tolerance >= 0 && *options.tolerance < 1), name,
                    "tolerance must be 0 or more and less than 1, but is ", options.tolerance.value_or(0), ".");
    detail::require(options.iterations.value_or(1) >= 1, name, "iterations must be at least 1, but is ",
                    options.iterations.value_or(1), ".");
    detail::require(!options.tolerance || !options.iterations, name,
                    "either tolerance or iterations may be given, but both are: ", options.tolerance.value_or(0),
                    " and ", options.iterations.value_or(0), ".");
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
    const auto take = [&](Index cols) { return detail::take_rows<T>(work, rows, cols); };
    const Index dims = heads_.query_cols(), value_dims = heads_.out_cols();
    attend(work, inputs, out, landmarks,
           {.query = take(dims),
            .key = take(dims),
            .out = take(value_dims),
            .out_log_sum_exp = work.take<double>(heads_.query * rows),
            .value = take(value_dims)});
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
    saved.inverse.resize(rows, heads_.query * landmarks.most());
    saved.log_sum_exp.resize(heads_.query, inputs.query.rows());
    attend(work, inputs, out, landmarks,
           {.query = saved.landmark_query,
            .key = saved.landmark_key,
            .out = saved.landmark_out,
            .out_log_sum_exp = saved.landmark_log_sum_exp.data(),
            .value = saved.landmark_value,
            .inverse = saved.inverse,
            .log_sum_exp = saved.log_sum_exp.data()});
  }

  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters&, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    detail::check_gradients<T>(name, heads_, inputs, out, grad_out, grad_inputs);
    detail::Work work(context);
    const detail::Landmarks landmarks(work, inputs, options_.landmarks);
    const Index rows = landmarks.count();
    check_saved(saved, landmarks, inputs.query.rows());
    const auto take = [&](Index cols) { return detail::take_rows<T>(work, rows, cols); };
    const Tokens<T> grad_query = take(heads_.query_cols()), grad_kernel_query = take(heads_.query_cols());
    const Tokens<T> grad_key = take(heads_.query_cols());
    const Tokens<T> grad_value = take(heads_.out_cols()), grad_landmark_out = take(heads_.out_cols());

    // Backwards through softmax(scale * q Kl^T) W, then W = A^+ B and A, then B, then the means.
    T* delta = work.take<T>(heads_.query * inputs.query.rows());
    detail::softmax_delta(work, heads_, out, grad_out, delta);
    detail::wide_window_backward(work, landmark_heads(), Window{}, scale(),
                                 landmarks.as_keys<T>(inputs, saved.landmark_key, saved.landmark_value),
                                 saved.log_sum_exp.data(), grad_out, delta, {grad_inputs.query, grad_key, grad_value});
    work.for_each(sequence_count(inputs) * heads_.query, [&](Index task, detail::Scratch& scratch) {
      solve_backward(landmarks.of(task / heads_.query), task % heads_.query, saved, grad_value,
                     {grad_kernel_query, grad_key, grad_landmark_out}, scratch);
    });
    detail::split_keys_backward<T>(work, heads_, scale(), landmarks.as_queries<T>(inputs, saved.landmark_query),
                                   saved.landmark_out, saved.landmark_log_sum_exp.data(), grad_landmark_out,
                                   {grad_query, grad_inputs.key, grad_inputs.value});
    grad_query.matrix() += grad_kernel_query.matrix();
    landmarks.add_average_gradient<T>(work, grad_query, heads_.dim, 1, grad_inputs.query);
    landmarks.add_average_gradient<T>(work, grad_key, heads_.dim, heads_.group(), grad_inputs.key);
  }

 private:
  static constexpr std::string_view name = "Nystrom";

  /// What stands between inputs and out, as in Saved; the last two may be null.
  struct Factors {
    Tokens<T> query;
    Tokens<T> key;
    Tokens<T> out;
    double* out_log_sum_exp;
    Tokens<T> value;
    Tokens<double> inverse = {};
    double* log_sum_exp = nullptr;
  };

  double scale() const { return detail::scale_or_default(options_.scale, heads_); }

  /// Each query head has landmark keys and values of its own.
  Heads landmark_heads() const { return {heads_.query, heads_.query, heads_.dim, heads_.value_width()}; }

  double tolerance(Index landmarks) const {
    return options_.tolerance.value_or(static_cast<double>(landmarks) * std::numeric_limits<T>::epsilon());
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
    detail::wide_window_attention(work, landmark_heads(), Window{}, scale(),
                                  landmarks.as_keys(inputs, Tokens<const T>(f.key), Tokens<const T>(f.value)), out,
                                  f.log_sum_exp);
  }

  // The share of one sequence and head in what each landmark has, `width` columns a head.
  template <class S>
  static Tokens<S> share(Tokens<S> tokens, Range landmarks, Index head, Index width) {
    return tokens.middle_rows(landmarks.first, landmarks.count()).head(head, width);
  }

  // The same of Saved::inverse.
  template <class S>
  Tokens<S> inverse_of(Tokens<S> inverse, Range landmarks, Index head) const {
    return share(inverse, landmarks, head, inverse.cols() / heads_.query).middle_cols(0, landmarks.count());
  }

  // W = A^+ B of one sequence and head.
  void solve(Range landmarks, Index head, const Factors& f, detail::Scratch& scratch) const {
    const Index count = landmarks.count(), dim = heads_.dim, value_dim = heads_.value_width();
    const auto take_double = [&](Tokens<const T> of_all, Index width) {
      return detail::copy_small<double>(scratch, share(of_all, landmarks, head, width));
    };
    const Tokens<double> key = detail::transpose_small(scratch, take_double(f.key, dim));
    const Tokens<double> inverse = invert(kernel(take_double(f.query, dim), key, scratch), scratch);
    const Tokens<double> out = take_double(f.out, value_dim);
    const Tokens<double> value = detail::take_product(scratch, detail::rows_of(inverse), count, out);
    detail::copy_entries(Tokens<const double>(value), share(f.value, landmarks, head, value_dim));
    if (f.inverse.data() == nullptr) return;
    detail::copy_entries(Tokens<const double>(inverse), inverse_of(f.inverse, landmarks, head));
  }

  struct KernelGradients {
    Tokens<T> query;  // written
    Tokens<T> key;    // added to
    Tokens<T> out;    // written
  };

  // A^+, in the place of A or elsewhere.
  Tokens<double> invert(Tokens<double> a, detail::Scratch& scratch) const {
    if (options_.iterations)
      return detail::take_inverse_iterates(scratch, a, *options_.iterations)[*options_.iterations];
    detail::pseudo_invert(a, tolerance(a.rows()), scratch);
    return a;
  }

  // The gradients of B, Ql and Kl from that of W = A^+ B.
  void solve_backward(Range landmarks, Index head, const Saved& saved, Tokens<const T> grad_value,
                      const KernelGradients& grad, detail::Scratch& scratch) const {
    using Small = Tokens<double>;
    using detail::add_product, detail::cols_of, detail::rows_of, detail::transpose_small;
    const Index count = landmarks.count(), dim = heads_.dim, value_dim = heads_.value_width();
    const auto take_double = [&](Tokens<const T> of_all, Index width) {
      return detail::copy_small<double>(scratch, share(of_all, landmarks, head, width));
    };
    const auto product = [&](detail::Broadcast<double> a, Small b, double factor = 1) {
      return detail::take_product(scratch, a, count, b, factor);
    };
    const Small query = take_double(saved.landmark_query, dim), key = take_double(saved.landmark_key, dim);
    const Small out = take_double(saved.landmark_out, value_dim), grad_w = take_double(grad_value, value_dim);
    const Small a = kernel(query, transpose_small(scratch, key), scratch);
    const Small p =
        detail::copy_small<double>(scratch, inverse_of(Tokens<const double>(saved.inverse), landmarks, head));

    const Small grad_b = product(cols_of(p), grad_w);
    const Small grad_p = product(rows_of(grad_w), transpose_small(scratch, out));
    const Small grad_a = options_.iterations
                             ? detail::take_iterated_inverse_gradient(scratch, a, *options_.iterations, grad_p)
                             : detail::take_pseudo_inverse_gradient<double>(scratch, a, p, grad_p, tolerance(count));

    // Through the softmax of each row.
    for (Index i = 0; i < count; ++i) {
      const detail::RowArray<double> weights(a.row(i), count);
      detail::RowArray<double> gradient(grad_a.row(i), count);
      const double delta = (weights * gradient).sum();
      gradient = scale() * weights * (gradient - delta);
    }
    const auto write = [&](Small gradient, Tokens<T> of_all, Index width) {
      detail::copy_entries(Tokens<const double>(gradient), share(of_all, landmarks, head, width));
    };
    const Small grad_key = take_double(grad.key, dim);
    add_product(cols_of(grad_a), query, grad_key);
    write(grad_b, grad.out, value_dim);
    write(product(rows_of(grad_a), key), grad.query, dim);
    write(grad_key, grad.key, dim);
  }

  // A = softmax(scale * Ql Kl^T) of one sequence and head.
  Tokens<double> kernel(Tokens<double> query, Tokens<double> key_transposed, detail::Scratch& scratch) const {
    using P = detail::Packet<double>;
    const Index count = query.rows();
    const Tokens<double> a = detail::take_product(scratch, detail::rows_of(query), count, key_transposed, scale());
    for (Index i = 0; i < count; ++i) {
      double* const row = a.row(i);
      detail::RowArray<double> entries(row, count);
      const double max = entries.maxCoeff();
      for (Index j = 0; j < count; j += detail::lanes<double>) {
        using namespace Eigen::internal;
        pstoreu(row + j, pexp(psub(ploadu<P>(row + j), pset1<P>(max))));
      }
      entries *= 1 / entries.sum();
    }
    return a;
  }

  void check_saved(const Saved& saved, const detail::Landmarks& landmarks, Index tokens) const {
    const Index rows = landmarks.count();
    detail::check_saved(name, "landmark_query", saved.landmark_query, rows, heads_.query_cols());
    detail::check_saved(name, "landmark_key", saved.landmark_key, rows, heads_.query_cols());
    detail::check_saved(name, "landmark_out", saved.landmark_out, rows, heads_.out_cols());
    detail::check_saved(name, "landmark_log_sum_exp", saved.landmark_log_sum_exp, heads_.query, rows);
    detail::check_saved(name, "landmark_value", saved.landmark_value, rows, heads_.out_cols());
    detail::check_saved(name, "inverse", saved.inverse, rows, heads_.query * landmarks.most());
    detail::check_saved(name, "log_sum_exp", saved.log_sum_exp, heads_.query, tokens);
  }

  Heads heads_;
  Options options_;
  [[no_unique_address]] Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
