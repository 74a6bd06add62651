#pragma once

#include <nearfar/engine/nystrom/small_matrix.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// The iteration towards A^-1 that Nystromformer takes in its place, for a square A whose rows each sum to one:
//
//   Z_0 = A^T / (|A|_1 |A|_inf),    Z_(j+1) = 1/4 Z_j (13 I - P (15 I - P (7 I - P))),    P = A Z_j
//
// (Razavi, Kerayechian, Gachpazan and Shateyi, "A new iterative method for finding approximate inverses of complex
// matrices", 2014). It is of third order once |I - P| < 1, and until then small singular values stay small: that is
// what makes few steps a regularised inverse. |A|_inf, the largest sum of a row, is one.

/// The bracket of one step: outer = 13 I - P middle, middle = 15 I - P inner, inner = 7 I - P.
template <class T>
struct InverseStep {
  Tokens<T> product;
  Tokens<T> inner;
  Tokens<T> middle;
  Tokens<T> outer;

  InverseStep(Scratch& scratch, Tokens<T> a, Tokens<T> z) : product(take_product(scratch, rows_of(a), a.rows(), z)) {
    inner = take_small<T>(scratch, a.rows(), a.rows());
    for (Index i = 0; i < a.rows(); ++i) {
      for (Index j = 0; j < a.rows(); ++j) inner(i, j) = -product(i, j);
    }
    add_to_diagonal(7, inner);
    middle = take_product(scratch, rows_of(product), a.rows(), inner, -1);
    add_to_diagonal(15, middle);
    outer = take_product(scratch, rows_of(product), a.rows(), middle, -1);
    add_to_diagonal(13, outer);
  }

  static void add_to_diagonal(T number, Tokens<T> to) {
    for (Index i = 0; i < to.rows(); ++i) to(i, i) += number;
  }
};

/// The column of A whose sum is the largest, |A|_1.
template <class T>
Index largest_column(Tokens<T> a, T& sum) {
  Index largest = 0;
  for (Index c = 0; c < a.cols(); ++c) {
    T of_column = 0;
    for (Index i = 0; i < a.rows(); ++i) of_column += a(i, c);
    if (c > 0 && of_column <= sum) continue;
    sum = of_column;
    largest = c;
  }
  return largest;
}

/// Z_0 to Z_steps. Time: 4 r^3 multiply-adds a step for an r x r matrix.
template <class T>
Tokens<T>* take_inverse_iterates(Scratch& scratch, Tokens<T> a, Index steps) {
  Tokens<T>* const iterates = scratch.take<Tokens<T>>(steps + 1);
  T sum = 0;
  largest_column(a, sum);
  iterates[0] = transpose_small(scratch, a);
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) iterates[0](i, j) /= sum;
  }
  for (Index s = 0; s < steps; ++s) {
    iterates[s + 1] = take_small<T>(scratch, a.rows(), a.cols());
    const Scratch::Scope scope(scratch);
    const InverseStep<T> step(scratch, a, iterates[s]);
    add_product(rows_of(iterates[s]), step.outer, iterates[s + 1], T(0.25));
  }
  return iterates;
}

/// The gradient of A from that of Z_steps, which is overwritten. The sums of A's rows count as constant: those of a
/// softmax are one.
template <class T>
Tokens<T> take_iterated_inverse_gradient(Scratch& scratch, Tokens<T> a, Index steps, Tokens<T> grad_z) {
  const Index size = a.rows();
  const Tokens<T>* const iterates = take_inverse_iterates(scratch, a, steps);
  const Tokens<T> grad_a = take_small<T>(scratch, size, size);
  for (Index s = steps; s-- > 0;) {
    const Scratch::Scope scope(scratch);
    const Tokens<T> z = iterates[s];
    const InverseStep<T> step(scratch, a, z);
    const auto transposed = [&](Tokens<T> x) { return transpose_small(scratch, x); };
    // Through outer = 13 I - P middle, and likewise the others: of the left factor and of the right one.
    const Tokens<T> grad_product = take_small<T>(scratch, size, size);
    const auto through = [&](Tokens<T> grad_bracket, Tokens<T> factor) {
      add_product(rows_of(grad_bracket), transposed(factor), grad_product, -1);
      return take_product(scratch, cols_of(step.product), size, grad_bracket, -1);
    };
    const Tokens<T> grad_outer = take_product(scratch, cols_of(z), size, grad_z, T(0.25));
    const Tokens<T> grad_middle = through(grad_outer, step.middle);
    const Tokens<T> grad_inner = through(grad_middle, step.inner);
    for (Index i = 0; i < size; ++i) {
      for (Index j = 0; j < size; ++j) grad_product(i, j) -= grad_inner(i, j);
    }
    add_product(rows_of(grad_product), transposed(z), grad_a);
    const Tokens<T> before = take_product(scratch, rows_of(grad_z), size, transposed(step.outer), T(0.25));
    add_product(cols_of(a), grad_product, before);
    copy_entries(Tokens<const T>(before), grad_z);
  }
  T sum = 0, grad_sum = 0;
  const Index largest = largest_column(a, sum);
  for (Index i = 0; i < size; ++i) {
    for (Index j = 0; j < size; ++j) {
      grad_a(i, j) += grad_z(j, i) / sum;
      grad_sum -= grad_z(j, i) * a(i, j) / (sum * sum);
    }
  }
  for (Index i = 0; i < size; ++i) grad_a(i, largest) += grad_sum;
  return grad_a;
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
