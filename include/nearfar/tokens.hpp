#pragma once

#include <nearfar/version.hpp>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

using Index = Eigen::Index;

template <class Scalar>
class Tokens;

/// The type in which sums over Scalar are carried: a narrower storage type would name a wider one here.
template <class Scalar>
struct AccumulatorOf {
  using type = Scalar;
};

template <class Scalar>
using Accumulator = typename AccumulatorOf<std::remove_const_t<Scalar>>::type;

/// The matrices that nearfar itself makes: saved results and parameters.
template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace detail {

template <class Dense>
concept DenseMatrix = std::is_base_of_v<Eigen::DenseBase<std::remove_cvref_t<Dense>>, std::remove_cvref_t<Dense>>;

/// Numbers that lie side by side, to compute with.
template <class Scalar>
using RowArray = Eigen::Map<
    std::conditional_t<std::is_const_v<Scalar>, const Eigen::Array<std::remove_const_t<Scalar>, 1, Eigen::Dynamic>,
                       Eigen::Array<Scalar, 1, Eigen::Dynamic>>>;

/// MatrixBase and its like, as which generic code of Eigen's takes any matrix.
template <class Base>
concept BaseOfDense = !DenseMatrix<Base> && requires(Base & matrix) {
  { matrix.derived() } -> DenseMatrix;
};

template <class Dense>
inline constexpr bool has_direct_access = (static_cast<unsigned>(Eigen::internal::traits<Dense>::Flags) &
                                           static_cast<unsigned>(Eigen::DirectAccessBit)) != 0;

template <class>
inline constexpr bool never = false;

template <class>
inline constexpr bool is_tokens = false;
template <class Scalar>
inline constexpr bool is_tokens<Tokens<Scalar>> = true;

}  // namespace detail

/// A view of a sequence: one row a token, the heads packed side by side in the columns. It never owns and never copies.
///
/// Made implicitly from any row-major Eigen matrix, array, map, reference or block of rows and columns, whatever its
/// row stride and alignment, also where generic code has it as a MatrixBase<Derived>; a column-major one does not
/// compile. `Tokens<const Scalar>` reads, `Tokens<Scalar>` also writes. The matrix must outlive the view. Throws
/// std::invalid_argument where the elements of a row do not lie side by side (an inner stride other than 1).
template <class Scalar>
class Tokens {
 public:
  using Plain = Matrix<std::remove_const_t<Scalar>>;
  using Map = Eigen::Map<std::conditional_t<std::is_const_v<Scalar>, const Plain, Plain>, Eigen::Unaligned,
                         Eigen::OuterStride<>>;

  Tokens() = default;

  Tokens(Scalar* data, Index rows, Index cols, Index stride) : data_(data), rows_(rows), cols_(cols), stride_(stride) {}

  template <detail::DenseMatrix Dense>
  Tokens(Dense&& matrix) {
    using Source = std::remove_reference_t<Dense>;
    // One branch a mistake, so that each is answered by its sentence alone.
    if constexpr (!detail::has_direct_access<std::remove_const_t<Source>>) {
      static_assert(detail::never<Dense>,
                    "nearfar: tokens are a matrix in memory, not an expression: evaluate it into a matrix first.");
    } else if constexpr (!Source::IsRowMajor) {
      static_assert(detail::never<Dense>,
                    "nearfar: tokens are row-major, one row a token: this matrix is column-major.");
    } else if constexpr (!std::is_same_v<typename Source::Scalar, std::remove_const_t<Scalar>>) {
      static_assert(detail::never<Dense>, "nearfar: the matrix and the attention have different scalar types.");
    } else if constexpr (!std::is_const_v<Scalar> && !std::is_lvalue_reference_v<Dense> &&
                         std::is_base_of_v<Eigen::PlainObjectBase<Source>, Source>) {
      static_assert(detail::never<Dense>, "nearfar: the result would be written into a matrix that is gone: name it.");
    } else if constexpr (!std::is_convertible_v<decltype(matrix.data()), Scalar*>) {
      static_assert(detail::never<Dense>, "nearfar: the result cannot be written into a const matrix.");
    } else {
      if (matrix.innerStride() != 1 && matrix.cols() > 1) {
        throw std::invalid_argument(
            "nearfar::Tokens: the elements of a row must lie side by side (inner stride 1), "
            "but this matrix has inner stride " +
            std::to_string(matrix.innerStride()) + ".");
      }
      *this = Tokens(matrix.data(), matrix.rows(), matrix.cols(), matrix.outerStride());
    }
  }

  template <detail::BaseOfDense Base>
  Tokens(Base&& matrix) : Tokens(matrix.derived()) {}

  template <class Other>
  requires(!detail::DenseMatrix<Other> && !detail::BaseOfDense<Other> && !detail::is_tokens<Other>)
      Tokens(const Other&) {
    static_assert(
        detail::never<Other>,
        "nearfar: tokens are a row-major Eigen matrix or, of any other memory, Tokens(data, rows, cols, stride): "
        "this is neither.");
  }

  operator Tokens<const Scalar>() const requires(!std::is_const_v<Scalar>) { return {data_, rows_, cols_, stride_}; }

  Scalar* data() const { return data_; }
  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index stride() const { return stride_; }
  Scalar* row(Index i) const { return data_ + i * stride_; }
  Scalar& operator()(Index i, Index j) const { return data_[i * stride_ + j]; }

  /// The rows [first, first + count).
  Tokens middle_rows(Index first, Index count) const { return {row(first), count, cols_, stride_}; }

  /// The columns [first, first + count).
  Tokens middle_cols(Index first, Index count) const { return {data_ + first, rows_, count, stride_}; }

  /// What every row has of head `head`, where heads of `width` columns stand side by side.
  Tokens head(Index head, Index width) const { return middle_cols(head * width, width); }

  Map matrix() const { return Map(data_, rows_, cols_, Eigen::OuterStride<>(stride_)); }

 private:
  Scalar* data_ = nullptr;
  Index rows_ = 0;
  Index cols_ = 0;
  Index stride_ = 0;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
