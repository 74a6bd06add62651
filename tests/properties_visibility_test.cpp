#include <nearfar/banded.hpp>

#include "subjects/properties.hpp"

// Which tokens see which: what no option may break, for every mechanism.

namespace nearfar::test {
namespace {

class Visibility : public Property {};

INSTANTIATE_TEST_SUITE_P(All, Visibility, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Visibility, CausalRowsKeepTheirBitsWhateverComesLater) {
  if (!causal()) GTEST_SKIP() << "not causal";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const Index n = 150;
    const auto sample = masked_sample<T>(n, 1);
    const Matrix<T> out = run_forward(*subject, sample);
    for (const Index first_changed : {1, 3, 4, 8, 31, 64, 65, 100, 149}) {
      auto changed = sample;
      const auto other = masked_sample<T>(n, 2);
      const Index count = n - first_changed;
      changed.query.bottomRows(count) = 30 * other.query.bottomRows(count);
      changed.key.bottomRows(count) = 30 * other.key.bottomRows(count);
      changed.value.bottomRows(count) = 30 * other.value.bottomRows(count);
      std::copy(other.key_mask.begin() + first_changed, other.key_mask.end(), changed.key_mask.begin() + first_changed);
      const Matrix<T> again = run_forward(*subject, changed);
      EXPECT_TRUE(same_bits(again.topRows(first_changed).eval(), out.topRows(first_changed).eval())) << first_changed;
      EXPECT_FALSE(same_bits(again.bottomRows(count).eval(), out.bottomRows(count).eval())) << first_changed;
      for (const T poison : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
        for (auto* matrix : {&changed.query, &changed.key, &changed.value}) {
          matrix->bottomRows(count).setConstant(poison);
        }
        const Matrix<T> poisoned = run_forward(*subject, changed);
        EXPECT_TRUE(same_bits(poisoned.topRows(first_changed).eval(), out.topRows(first_changed).eval()))
            << first_changed;
        EXPECT_FALSE(finite(poisoned)) << first_changed;
      }
    }
  });
}

TEST(WindowVisibility, WhatIsNotFiniteReachesNoRowThatDoesNotSeeIt) {
  in_each_scalar([]<class T>(T) {
    const Heads heads{.query = 4, .key_value = 2, .dim = 20};
    const Index n = 400;
    for (const Index side : {2, 20, 100}) {
      const Banded<T> attention(heads, {.window = {.left = side, .right = side}});
      const auto sample = random_sample<T>(heads, n, 60);
      Matrix<T> out(n, heads.out_cols()), again = out;
      attention.forward(sample.inputs(), out);
      for (const T poison : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
        for (const Index bad : {0, 1, 47, 64, 200, 399}) {
          auto changed = sample;
          changed.key.row(bad).setConstant(poison);
          changed.value.row(bad).setConstant(poison);
          attention.forward(changed.inputs(), again);
          for (Index i = 0; i < n; ++i) {
            const bool sees = std::abs(i - bad) <= side;
            EXPECT_EQ(same_bits(again.row(i).eval(), out.row(i).eval()), !sees) << bad << " by row " << i;
          }
        }
      }
    }
  });
}

// Which keys share a tile with those that a row sees depends on which later ones are masked.
TEST_P(Visibility, CausalRowsKeepTheirBitsWhicheverLaterKeysAreMasked) {
  if (!causal()) GTEST_SKIP() << "not causal";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const Index n = 150;
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
      const auto sample = masked_sample<T>(n, seed);
      const Matrix<T> out = run_forward(*subject, sample);
      for (const Index first_changed : {17, 31, 65, 90}) {
        auto changed = sample;
        const auto mask = Random(seed + 2000).mask(n, 0.8);
        std::copy(mask.begin() + first_changed, mask.end(), changed.key_mask.begin() + first_changed);
        const Matrix<T> again = run_forward(*subject, changed);
        EXPECT_TRUE(same_bits(again.topRows(first_changed).eval(), out.topRows(first_changed).eval()))
            << first_changed << ", " << seed;
      }
    }
  });
}

TEST_P(Visibility, CausalQueriesAreAlignedWithTheEndOfTheKeys) {
  if (!causal() || !any_shape()) GTEST_SKIP() << "not causal, or as many queries as keys";
  const auto subject = make<double>();
  const auto whole = masked_sample<double>(90, 3);
  for (const Index queries : {1, 2, 37, 89}) {
    auto last = whole;
    last.query = whole.query.bottomRows(queries).eval();
    EXPECT_TRUE(close(run_forward(*subject, last), run_forward(*subject, whole).bottomRows(queries).eval(), 1e-12))
        << queries;
  }
}

TEST_P(Visibility, PackedSequencesAreAsOneByOne) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    std::vector<Sample<T>> sequences;
    for (const Index n : {0, 1, 33, 0, 0, 5, 130, 2, 0})
      sequences.push_back(masked_sample<T>(n, 10 + sequences.size()));
    const auto packed = pack<T>(sequences);
    const Matrix<T> out = run_forward(*subject, packed, 2);
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      const Index rows = sequences[b].query.rows();
      EXPECT_TRUE(close(out.middleRows(packed.query_offsets[b], rows).eval(), run_forward(*subject, sequences[b]),
                        tolerance<T>()))
          << "sequence " << b;
    }
  });
}

TEST_P(Visibility, PackedSequencesMayHaveMoreOrFewerKeysThanQueries) {
  if (!any_shape()) GTEST_SKIP() << "as many queries as keys";
  const auto subject = make<double>();
  std::vector<Sample<double>> sequences;
  for (const auto& [queries, keys] : {std::pair<Index, Index>{3, 70}, {40, 7}, {0, 5}, {6, 0}, {0, 0}, {65, 66}}) {
    sequences.push_back(random_sample<double>(grouped_heads(), queries, 20 + sequences.size(), keys));
  }
  const auto packed = pack<double>(sequences);
  const Matrix<double> out = run_forward(*subject, packed);
  EXPECT_TRUE(close(out, GetParam().reference(*subject, packed.inputs()), tolerance<double>()));
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const Index rows = sequences[b].query.rows();
    EXPECT_TRUE(close(out.middleRows(packed.query_offsets[b], rows).eval(), run_forward(*subject, sequences[b]),
                      tolerance<double>()))
        << "sequence " << b;
  }
}

TEST_P(Visibility, KeyPaddedSequenceIsAsTheShorterOne) {
  if (!GetParam().padding_is_shortening) GTEST_SKIP() << "the length, or masked tokens' queries, enter the result";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {1, 7, 32, 61, 100}) {
      auto padded = masked_sample<T>(n + 29, 30);
      std::fill(padded.key_mask.begin() + n, padded.key_mask.end(), std::uint8_t{0});
      poison_masked_keys(padded);
      auto shorter = first_tokens(padded, n);
      // A masked token may read its own value: that one must be a number.
      for (auto* sample : {&padded, &shorter}) sample->value.topRows(n) = masked_sample<T>(n, 31).value;
      EXPECT_TRUE(
          close(run_forward(*subject, padded).topRows(n).eval(), run_forward(*subject, shorter), tolerance<T>()))
          << n;
    }
  });
}

TEST_P(Visibility, GroupedHeadsAreAsRepeatedHeads) {
  in_each_scalar([]<class T>(T) {
    for (const Index key_heads : {1, 2}) {
      Heads heads = grouped_heads();
      heads.key_value = key_heads;
      Heads repeated = heads;
      repeated.key_value = heads.query;
      auto sample = random_sample<T>(heads, 70, 40);
      sample.key_mask = Random(41).mask(70, 0.2);
      EXPECT_TRUE(close(run_forward(*make<T>(heads), sample),
                        run_forward(*make<T>(repeated), repeat_key_heads(heads, sample)), tolerance<T>()));
    }
  });
}

TEST_P(Visibility, MaskedKeysAndValuesAreNeverRead) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const T poison : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
      const auto clean = masked_sample<T>(140, 50);
      auto poisoned = clean;
      poison_masked_keys(poisoned, poison);
      const Matrix<T> expected = run_forward(*subject, clean), actual = run_forward(*subject, poisoned);
      for (Index i = 0; i < expected.rows(); ++i) {
        if (GetParam().masked_token_reads_itself && clean.key_mask[static_cast<std::size_t>(i)] == 0) continue;
        EXPECT_TRUE(same_bits(actual.row(i).eval(), expected.row(i).eval())) << "row " << i;
      }
    }
  });
}

TEST_P(Visibility, NoKeyToSeeGivesZeroRows) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {1, 6, 77}) {
      auto sample = random_sample<T>(grouped_heads(), n, 60);
      sample.key_mask.assign(static_cast<std::size_t>(n), 0);
      poison_masked_keys(sample);
      const Matrix<T> out = run_forward(*subject, sample);
      if (GetParam().masked_token_reads_itself) {
        const auto in_double = make<double>();
        EXPECT_TRUE(close(out, GetParam().reference(*in_double, cast<double>(sample).inputs()), tolerance<T>())) << n;
      } else {
        EXPECT_TRUE(out.isZero(0)) << n;
      }
    }
  });
}

}  // namespace
}  // namespace nearfar::test
