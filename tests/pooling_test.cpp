#include <nearfar/engine/multipole/pooling_convolution.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

// The hierarchy of the multipole method and the pooling over it, against loops that follow the definitions.

namespace {

using nearfar::Index;
using nearfar::Matrix;
using nearfar::PoolingConvolution;
using nearfar::Range;
using nearfar::Tokens;
using nearfar::detail::ConvolutionPooling;
using nearfar::detail::HeadRows;
using nearfar::detail::Hierarchy;
using nearfar::detail::InteractionSide;
using nearfar::detail::NearField;
using Mask = std::vector<std::uint8_t>;

struct Shape {
  Index tokens;
  Index block;
  Index rank;
};

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const auto& [block, rank] :
       std::vector<std::pair<Index, Index>>{{1, 1}, {2, 1}, {2, 2}, {3, 3}, {4, 2}, {6, 2}}) {
    for (Index n : {0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 64, 97}) all.push_back({n, block, rank});
  }
  return all;
}

Matrix<double> random_matrix(Index rows, Index cols, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  return Matrix<double>::NullaryExpr(rows, cols, [&] { return normal(generator); });
}

// About a third of the tokens masked, and a run of them long enough to empty whole groups.
Mask some_mask(Index n) {
  Mask mask(static_cast<std::size_t>(n), 1);
  for (Index i = 0; i < n; ++i) {
    if (i % 3 == 1 || (i >= n / 2 && i < n / 2 + 10)) mask[static_cast<std::size_t>(i)] = 0;
  }
  return mask;
}

bool present(const Mask& mask, Index i) { return mask.empty() || mask[static_cast<std::size_t>(i)] != 0; }

// Rows of all levels of one matrix: head h of pooled row r in row h * rows + r.
struct Pooled {
  Pooled(const Hierarchy& tree, Index head_count, Index dim)
      : matrix(Matrix<double>::Constant(head_count * tree.rows(), dim, std::nan(""))),
        rows(tree.rows()),
        heads(head_count) {}

  HeadRows<double> view() { return {matrix.data(), matrix.cols(), rows * matrix.cols(), heads, matrix.cols()}; }
  auto row(Index head, Index r) { return matrix.row(head * rows + r); }

  Matrix<double> matrix;
  Index rows;
  Index heads;
};

std::vector<double> counted(const Hierarchy& tree, const Mask& mask) {
  std::vector<double> count(static_cast<std::size_t>(tree.rows()));
  nearfar::detail::count_tokens(tree, mask.empty() ? nullptr : mask.data(), count.data());
  return count;
}

TEST(Hierarchy, HasTheLevelsOfTheDefinition) {
  for (const Shape& s : shapes()) {
    if (s.tokens == 0) continue;
    const double doublings = std::ceil(std::log2(static_cast<double>(s.tokens) / static_cast<double>(s.block)));
    EXPECT_EQ(Hierarchy(s.tokens, s.block, s.rank).levels(), std::max(0.0, doublings - 1))
        << s.tokens << " tokens, block " << s.block;
  }
}

TEST(Hierarchy, CoversEveryTokenOnceByNearFieldAndInteractionLists) {
  for (const Shape& s : shapes()) {
    for (const bool causal : {false, true}) {
      const Hierarchy tree(s.tokens, s.block, s.rank);
      const NearField near(tree, causal);
      for (Index i = 0; i < s.tokens; ++i) {
        std::vector<int> seen(static_cast<std::size_t>(s.tokens), 0);
        for (Index j = near.first(i); j < near.end(i); ++j) ++seen[static_cast<std::size_t>(j)];
        for (Index l = 1; l <= tree.levels(); ++l) {
          const auto list = tree.interaction_list(l, i / tree.level(l).width, causal);
          for (const Range& rows : {list.left, list.right}) {
            for (Index row = rows.first; row < rows.end; ++row) {
              const Index first = (row - tree.level(l).first_row) * tree.sub_block(l);
              for (Index j = first; j < std::min(first + tree.sub_block(l), s.tokens); ++j) {
                ++seen[static_cast<std::size_t>(j)];
              }
            }
          }
        }
        for (Index j = 0; j < s.tokens; ++j) {
          ASSERT_EQ(seen[static_cast<std::size_t>(j)], causal && j > i ? 0 : 1)
              << s.tokens << " tokens, block " << s.block << ", query " << i << ", key " << j;
        }
      }
    }
  }
}

TEST(Hierarchy, TellsWhichQueriesSeeANearKey) {
  const Hierarchy tree(23, 4, 2);
  for (const bool causal : {false, true}) {
    const NearField near(tree, causal);
    for (Index i = 0; i < 23; ++i) {
      for (Index j = 0; j < 23; ++j) {
        EXPECT_EQ(near.first(i) <= j && j < near.end(i), near.seeing(j).first <= i && i < near.seeing(j).end);
      }
    }
  }
}

TEST(Hierarchy, GivesPooledQueriesTheTwoSidesOfTheInteractionLists) {
  for (const Shape& s : shapes()) {
    const Hierarchy tree(s.tokens, s.block, s.rank);
    for (Index l = 1; l <= tree.levels(); ++l) {
      const Index first = tree.level(l).first_row;
      const Index rows = tree.level(l).groups * s.rank;
      for (Index query = 0; query < rows; ++query) {
        const auto list = tree.interaction_list(l, query / s.rank, false);
        for (const bool right : {false, true}) {
          const InteractionSide side(tree, l, right);
          const Range expected = right ? list.right : list.left;
          const Range seen = side.seen_by_any(query, 1);
          EXPECT_EQ(seen.count(), expected.count());
          if (expected.count() > 0) {
            EXPECT_EQ(seen.first, expected.first - first);
          }
          for (Index key = 0; key < rows; ++key) {
            EXPECT_EQ(seen.first <= key && key < seen.end,
                      side.seeing(key).first <= query && query < side.seeing(key).end);
          }
        }
      }
    }
  }
}

TEST(AveragePooling, IsTheMeanOfTheUnmaskedTokensOfEachSubBlock) {
  const Index heads = 3;
  const Index dim = 5;
  nearfar::Context context(1);
  for (const Shape& s : shapes()) {
    for (const bool masked : {false, true}) {
      const Hierarchy tree(s.tokens, s.block, s.rank);
      const Mask mask = masked ? some_mask(s.tokens) : Mask{};
      Matrix<double> x = random_matrix(s.tokens, heads * dim, 1);
      for (Index i = 0; i < s.tokens; ++i) {
        if (!present(mask, i)) x.row(i).setConstant(std::nan(""));
      }
      const std::vector<double> count = counted(tree, mask);
      Pooled pooled(tree, heads, dim);
      {
        nearfar::detail::Work work(context);
        nearfar::detail::pool_average<double>(work, tree, nearfar::detail::head_rows(Tokens<const double>(x), heads),
                                              masked ? mask.data() : nullptr, count.data(), pooled.view());
      }
      for (Index l = 1; l <= tree.levels(); ++l) {
        for (Index r = 0; r < tree.level(l).groups * s.rank; ++r) {
          const Index row = tree.level(l).first_row + r;
          Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(heads * dim);
          double n = 0;
          for (Index i = r * tree.sub_block(l); i < std::min((r + 1) * tree.sub_block(l), s.tokens); ++i) {
            if (!present(mask, i)) continue;
            sum += x.row(i);
            ++n;
          }
          ASSERT_EQ(count[static_cast<std::size_t>(row)], n);
          if (n > 0) sum /= n;
          for (Index h = 0; h < heads; ++h) {
            ASSERT_LT((pooled.row(h, row) - sum.segment(h * dim, dim)).cwiseAbs().maxCoeff(), 1e-14)
                << s.tokens << " tokens, block " << s.block << ", level " << l << ", row " << r;
          }
        }
      }
      ASSERT_TRUE(pooled.matrix.allFinite());
    }
  }
}

TEST(AveragePooling, HandsGradientsDownAsTheTransposeOfTheMeans) {
  const Index heads = 2;
  const Index dim = 3;
  nearfar::Context context(1);
  for (const Shape& s : shapes()) {
    const Hierarchy tree(s.tokens, s.block, s.rank);
    const Mask mask = some_mask(s.tokens);
    const std::vector<double> count = counted(tree, mask);
    Pooled grad(tree, heads, dim);
    grad.matrix = random_matrix(grad.matrix.rows(), dim, 2);
    const Matrix<double> before = random_matrix(s.tokens, heads * dim, 3);
    Matrix<double> expected = before;
    for (Index l = 1; l <= tree.levels(); ++l) {
      for (Index i = 0; i < s.tokens; ++i) {
        if (!present(mask, i)) continue;
        const Index row = tree.level(l).first_row + i / tree.sub_block(l);
        for (Index h = 0; h < heads; ++h) {
          expected.row(i).segment(h * dim, dim) += grad.row(h, row) / count[static_cast<std::size_t>(row)];
        }
      }
    }
    Matrix<double> found = before;
    nearfar::detail::Work work(context);
    nearfar::detail::pool_average_backward<double>(work, tree, mask.data(), count.data(), grad.view(),
                                                   nearfar::detail::head_rows(Tokens<double>(found), heads));
    ASSERT_TRUE(found.isApprox(expected, 1e-13) || s.tokens == 0) << s.tokens << " tokens, block " << s.block;
  }
}

// The definition of learned pooling, for one head: pooled row r of group g of level l, from the tokens or from the
// level below.
struct NaiveConvolution {
  const Hierarchy& tree;
  bool hierarchical;
  const std::vector<PoolingConvolution<double>>& levels;
  const Mask& mask;

  bool empty(Index l, Index g) const {
    for (Index i = g * tree.level(l).width; i < std::min((g + 1) * tree.level(l).width, tree.tokens()); ++i) {
      if (present(mask, i)) return false;
    }
    return true;
  }

  Eigen::RowVectorXd pooled(const Matrix<double>& x, Index l, Index g, Index r) const {
    const Index dim = x.cols();
    const Index rank = tree.rank();
    if (empty(l, g)) return Eigen::RowVectorXd::Zero(dim);
    const PoolingConvolution<double>& level = levels[static_cast<std::size_t>(l - 1)];
    Eigen::RowVectorXd row(dim);
    for (Index c = 0; c < dim; ++c) row(c) = level.bias(0, c * rank + r);
    for (Index t = 0; t < level.weight.cols(); ++t) {
      Eigen::RowVectorXd child = Eigen::RowVectorXd::Zero(dim);
      if (l == 1 || !hierarchical) {
        const Index i = g * tree.level(l).width + t;
        if (i < tree.tokens() && present(mask, i)) child = x.row(i);
      } else {
        child = pooled(x, l - 1, 2 * g + t / rank, t % rank);
      }
      for (Index c = 0; c < dim; ++c) row(c) += level.weight(c * rank + r, t) * child(c);
    }
    return row;
  }
};

std::vector<PoolingConvolution<double>> random_levels(const Hierarchy& tree, bool hierarchical, Index dim) {
  std::vector<PoolingConvolution<double>> levels;
  for (Index l = 1; l <= tree.levels(); ++l) {
    const Index window = l == 1 || !hierarchical ? tree.level(l).width : 2 * tree.rank();
    levels.push_back({random_matrix(dim * tree.rank(), window, 10 + static_cast<unsigned>(l)) / std::sqrt(window),
                      random_matrix(1, dim * tree.rank(), 30 + static_cast<unsigned>(l))});
  }
  return levels;
}

TEST(ConvolutionPooling, FollowsTheDefinitionOfBothForms) {
  const Index heads = 2;
  const Index dim = 3;
  nearfar::Context context(1);
  for (const Shape& s : shapes()) {
    for (const bool hierarchical : {false, true}) {
      const Hierarchy tree(s.tokens, s.block, s.rank);
      const auto levels = random_levels(tree, hierarchical, dim);
      const Mask mask = some_mask(s.tokens);
      const NaiveConvolution naive{tree, hierarchical, levels, mask};
      Matrix<double> x = random_matrix(s.tokens, heads * dim, 1);
      for (Index i = 0; i < s.tokens; ++i) {
        if (!present(mask, i)) x.row(i).setConstant(std::nan(""));
      }
      std::vector<double> mass = counted(tree, mask);
      nearfar::detail::share_mass(tree, mass.data());
      Pooled pooled(tree, heads, dim);
      nearfar::detail::Work work(context);
      ConvolutionPooling<double>(work, tree, hierarchical, levels, dim, mask.data(), mass.data())
          .forward(nearfar::detail::head_rows(Tokens<const double>(x), heads), pooled.view());
      for (Index l = 1; l <= tree.levels(); ++l) {
        for (Index g = 0; g < tree.level(l).groups; ++g) {
          for (Index r = 0; r < s.rank; ++r) {
            const Index row = tree.level(l).first_row + g * s.rank + r;
            for (Index h = 0; h < heads; ++h) {
              const Matrix<double> head = x.middleCols(h * dim, dim);
              ASSERT_LT((pooled.row(h, row) - naive.pooled(head, l, g, r)).cwiseAbs().maxCoeff(), 1e-12)
                  << s.tokens << " tokens, block " << s.block << ", level " << l << ", group " << g;
            }
          }
        }
      }
    }
  }
}

// loss = sum(grad_pooled * pooled) is linear in the tokens and in each level's weights and biases, so a difference
// quotient of any step is exact but for rounding.
TEST(ConvolutionPooling, HasTheGradientsOfBothForms) {
  const Index heads = 2;
  const Index dim = 2;
  nearfar::Context context(1);
  for (const Shape& s : {Shape{37, 4, 2}, Shape{30, 3, 3}, Shape{9, 1, 1}, Shape{7, 8, 4}}) {
    for (const bool hierarchical : {false, true}) {
      const Hierarchy tree(s.tokens, s.block, s.rank);
      auto levels = random_levels(tree, hierarchical, dim);
      const Mask mask = some_mask(s.tokens);
      Matrix<double> x = random_matrix(s.tokens, heads * dim, 1);
      std::vector<double> mass = counted(tree, mask);
      nearfar::detail::share_mass(tree, mass.data());
      Matrix<double> weights(heads * tree.rows(), dim);
      weights = random_matrix(heads * tree.rows(), dim, 5);

      const auto loss = [&] {
        Pooled pooled(tree, heads, dim);
        nearfar::detail::Work work(context);
        ConvolutionPooling<double>(work, tree, hierarchical, levels, dim, mask.data(), mass.data())
            .forward(nearfar::detail::head_rows(Tokens<const double>(x), heads), pooled.view());
        return pooled.matrix.cwiseProduct(weights).sum();
      };

      Pooled pooled(tree, heads, dim);
      Pooled grad(tree, heads, dim);
      grad.matrix = weights;
      for (Index row = 0; row < tree.rows(); ++row) {
        // An empty group has no score: nothing flows into it.
        if (mass[static_cast<std::size_t>(row)] > 0) continue;
        for (Index h = 0; h < heads; ++h) grad.row(h, row).setZero();
      }
      Matrix<double> grad_x = Matrix<double>::Zero(s.tokens, heads * dim);
      auto grad_levels = levels;
      for (auto& level : grad_levels) level.weight.setZero(), level.bias.setZero();
      {
        nearfar::detail::Work work(context);
        const ConvolutionPooling<double> pooling(work, tree, hierarchical, levels, dim, mask.data(), mass.data());
        const auto tokens = nearfar::detail::head_rows(Tokens<const double>(x), heads);
        pooling.forward(tokens, pooled.view());
        pooling.backward(tokens, pooled.view(), grad.view(), nearfar::detail::head_rows(Tokens<double>(grad_x), heads),
                         grad_levels);
      }

      const auto expect_gradient = [&](Matrix<double>& of, const Matrix<double>& found, const char* what) {
        for (Index i = 0; i < of.size(); ++i) {
          const double kept = of.data()[i];
          of.data()[i] = kept + 1;
          const double above = loss();
          of.data()[i] = kept - 1;
          const double below = loss();
          of.data()[i] = kept;
          ASSERT_NEAR(found.data()[i], (above - below) / 2, 1e-11) << what << ", entry " << i;
        }
      };
      expect_gradient(x, grad_x, "tokens");
      for (std::size_t l = 0; l < levels.size(); ++l) {
        expect_gradient(levels[l].weight, grad_levels[l].weight, "weight");
        expect_gradient(levels[l].bias, grad_levels[l].bias, "bias");
      }
    }
  }
}

TEST(Pooling, IsBitIdenticalForAnyNumberOfThreads) {
  const Index tokens = 5000;
  const Index heads = 2;
  const Index dim = 4;
  const Hierarchy tree(tokens, 8, 4);
  const Mask mask = some_mask(tokens);
  const Matrix<double> x = random_matrix(tokens, heads * dim, 1);
  const auto rows = nearfar::detail::head_rows(Tokens<const double>(x), heads);
  const std::vector<double> count = counted(tree, mask);
  std::vector<double> mass = count;
  nearfar::detail::share_mass(tree, mass.data());

  const auto pooled = [&](int form, int threads) {
    nearfar::Context context(threads);
    nearfar::detail::Work work(context);
    Pooled result(tree, heads, dim);
    if (form == 0) {
      nearfar::detail::pool_average<double>(work, tree, rows, mask.data(), count.data(), result.view());
    } else {
      const auto levels = random_levels(tree, form == 2, dim);
      ConvolutionPooling<double>(work, tree, form == 2, levels, dim, mask.data(), mass.data())
          .forward(rows, result.view());
    }
    return result.matrix;
  };
  for (int form = 0; form < 3; ++form) {
    const Matrix<double> alone = pooled(form, 1);
    for (const int threads : {2, 3, 8}) {
      EXPECT_TRUE((pooled(form, threads).array() == alone.array()).all()) << "form " << form << ", threads " << threads;
    }
  }
}

}  // namespace
