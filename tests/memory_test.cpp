#include <nearfar/additive.hpp>
#include <nearfar/banded.hpp>
#include <nearfar/detail/scratch.hpp>
#include <nearfar/multipole.hpp>
#include <nearfar/softmax.hpp>

#include "support/sample.hpp"

#include <gtest/gtest.h>

// What calls take beside inputs and result, where it is not what the shapes of a few matrices say.

namespace nearfar::test {
namespace {

constexpr std::size_t mebibyte = std::size_t{1} << 20;

TEST(Memory, OfScratchIsLittleMoreThanWhatWasTaken) {
  detail::Scratch scratch;
  for (const Index bytes : {30 << 20, 5 << 20}) {
    const detail::Scratch::Scope scope(scratch);
    scratch.take<char>(bytes);
    for (int i = 0; i < 100; ++i) scratch.take<char>(1000);
  }
  EXPECT_GE(scratch.bytes(), 30 * mebibyte);
  EXPECT_LE(scratch.bytes(), 32 * mebibyte);
}

/// Of Softmax of one query a sequence, sequences of so many keys.
std::size_t memory_of_decoding(const std::vector<Index>& keys) {
  const Heads heads{8, 2, 32};
  std::vector<Index> query_offsets{0}, key_offsets{0};
  for (const Index count : keys) {
    query_offsets.push_back(query_offsets.back() + 1);
    key_offsets.push_back(key_offsets.back() + count);
  }
  const auto sample = random_sample<float>(heads, query_offsets.back(), 1, key_offsets.back());
  Inputs<float> inputs = sample.inputs();
  inputs.query_offsets = query_offsets;
  inputs.key_offsets = key_offsets;
  Matrix<float> out(query_offsets.back(), heads.out_cols());
  Context context(1);
  Softmax<float>(heads).forward(inputs, out, context);
  return context.scratch_bytes();
}

TEST(Memory, OfDecodingIsThatOfTheKeysThereAre) {
  std::vector<Index> keys(256, 10);
  keys[100] = 40000;
  EXPECT_LE(memory_of_decoding(keys),
            2 * (memory_of_decoding({40000}) + memory_of_decoding(std::vector<Index>(256, 10))));
}

TEST(Memory, OfAdditiveGradientsIsAFewRowsASequence) {
  const Heads heads{32, 32, 8};
  const Index n = 4096;
  auto sample = random_sample<float>(heads, n, 3);
  for (Index i = 0; i <= n; i += 4) sample.query_offsets.push_back(i);
  for (const bool causal : {false, true}) {
    const Additive<float> attention(heads, {.causal = causal, .transform = false});
    Context context(1);
    Additive<float>::Saved saved;
    auto gradients = attention.parameters();
    Matrix<float> out(n, heads.out_cols()), query = out, key = out, value = out;
    attention.forward(sample.inputs(), out, saved, context);
    attention.backward(sample.inputs(), out, saved, sample.query, {query, key, value}, gradients, context);
    EXPECT_LE(context.scratch_bytes(), 3 * static_cast<std::size_t>(query.size()) * sizeof(float)) << causal;
  }
}

TEST(Memory, OfMultipoleIsThatOfTheLongestSequence) {
  const Heads heads{2, 2, 16};
  const Multipole<float> attention(heads, {.block = 16, .pooling = Pooling::grouped_convolution, .levels = 6});
  const auto memory_of = [&](Index sequences) {
    const Index length = 1024;
    auto sample = random_sample<float>(heads, sequences * length, 4);
    for (Index b = 0; b <= sequences; ++b) sample.query_offsets.push_back(b * length);
    Matrix<float> out(sequences * length, heads.out_cols());
    Context context(1);
    attention.forward(sample.inputs(), out, context);
    return context.scratch_bytes();
  };
  EXPECT_LE(memory_of(16), memory_of(1) + mebibyte);
}

TEST(Memory, OfANarrowBandsGradientIsThatOfTheQueriesThatSeeEachSegment) {
  // Many segments, as there is only one key head; a window of more than 64 keys, as narrower ones go another way.
  const Heads heads{8, 1, 16};
  const Index n = 8192;
  const auto sample = random_sample<float>(heads, n, 2);
  const Banded<float> attention(heads, {.window = {100, 0}});
  Context context(1);
  Banded<float>::Saved saved;
  NoParameters none;
  Matrix<float> out(n, heads.out_cols()), query(n, heads.query_cols()), key(n, heads.key_cols()),
      value(n, heads.value_cols());
  attention.forward(sample.inputs(), out, saved, context);
  attention.backward(sample.inputs(), out, saved, sample.query, {query, key, value}, none, context);
  EXPECT_LE(context.scratch_bytes(), static_cast<std::size_t>(query.size()) * sizeof(float) + 3 * mebibyte);
}

}  // namespace
}  // namespace nearfar::test
