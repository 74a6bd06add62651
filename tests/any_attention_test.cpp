#include <nearfar/any_attention.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <locale>
#include <string>
#include <vector>

namespace {

using namespace nearfar;
using nearfar::test::random_sample;
using nearfar::test::run_forward;
using nearfar::test::same_bits;

static_assert(Attention<AnyAttention<float>>);
static_assert(Attention<AnyAttention<double>>);

constexpr Heads heads{.query = 2, .key_value = 2, .dim = 4};

std::string line_of(std::string_view line) { return AnyAttention<float>(heads, line).line(); }

/// The sentence with which a line is refused.
std::string error_of(std::string_view line) {
  try {
    AnyAttention<float> attention(heads, line);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

/// The options that a line gives to a mechanism.
template <template <class> class Mechanism, class Options = typename Mechanism<float>::Options>
Options options_of(std::string_view line) {
  Options found;
  AnyAttention<float>(heads, line).visit([&](const auto& mechanism) {
    if constexpr (requires { found = mechanism.options(); }) found = mechanism.options();
  });
  return found;
}

/// A line for each mechanism that sets every option to what is not its default.
const std::vector<std::string> full_lines = {
    "softmax:causal,scale=0.25",
    "banded:left=3,right=5,causal,scale=0.25",
    "linear:maps=tanh+elu_flip,causal,normalizer=sqrt_length,eps=0.001,normalize_features",
    "nystrom:landmarks=3,scale=0.25,tolerance=1e-9",
    "additive:causal,scale=0.25,per_head_weights,bias=off,transform=off,add_query=off",
    "multipole:block=8,rank=2,mass_scaling=off,pooling=hierarchical_convolution,pooled_queries,query_pooling=all,"
    "scale=0.25,levels=3",
};

TEST(AnyAttention, IsTheMechanismThatTheLineNames) {
  for (const std::string& line : full_lines) {
    const AnyAttention<float> attention(heads, line);
    EXPECT_EQ(attention.name(), line.substr(0, line.find(':')));
    EXPECT_EQ(attention.heads(), heads);
  }
}

TEST(AnyAttention, ReadsEveryOption) {
  const auto softmax = options_of<Softmax>(full_lines[0]);
  EXPECT_TRUE(softmax.causal);
  EXPECT_EQ(softmax.scale, 0.25);

  const auto banded = options_of<Banded>(full_lines[1]);
  EXPECT_EQ(banded.window, (Window{3, 5}));
  EXPECT_TRUE(banded.causal);
  EXPECT_EQ(banded.scale, 0.25);

  const auto linear = options_of<Linear>(full_lines[2]);
  ASSERT_EQ(linear.feature_maps.size(), 2u);
  EXPECT_EQ(linear.feature_maps[0].name(), "tanh");
  EXPECT_EQ(linear.feature_maps[1].name(), "elu_flip");
  EXPECT_TRUE(linear.causal);
  EXPECT_EQ(linear.normalizer, Normalizer::sqrt_length);
  EXPECT_EQ(linear.eps, 0.001);
  EXPECT_TRUE(linear.normalize_features);

  const auto nystrom = options_of<Nystrom>(full_lines[3]);
  EXPECT_EQ(nystrom.landmarks, 3);
  EXPECT_EQ(nystrom.scale, 0.25);
  EXPECT_EQ(nystrom.tolerance, 1e-9);

  const auto additive = options_of<Additive>(full_lines[4]);
  EXPECT_TRUE(additive.causal);
  EXPECT_EQ(additive.scale, 0.25);
  EXPECT_TRUE(additive.per_head_weights);
  EXPECT_FALSE(additive.bias);
  EXPECT_FALSE(additive.transform);
  EXPECT_FALSE(additive.add_query);

  const auto multipole = options_of<Multipole>(full_lines[5]);
  EXPECT_EQ(multipole.block, 8);
  EXPECT_EQ(multipole.rank, 2);
  EXPECT_FALSE(multipole.causal);
  EXPECT_FALSE(multipole.mass_scaling);
  EXPECT_EQ(multipole.pooling, Pooling::hierarchical_convolution);
  EXPECT_TRUE(multipole.pooled_queries);
  EXPECT_EQ(multipole.query_pooling, QueryPooling::all);
  EXPECT_EQ(multipole.scale, 0.25);
  EXPECT_EQ(multipole.levels, 3);
  EXPECT_TRUE(options_of<Multipole>("multipole:causal").causal);
}

TEST(AnyAttention, LeavesTheOtherOptionsAtTheirDefaults) {
  const auto multipole = options_of<Multipole>("multipole:rank=8");
  EXPECT_EQ(multipole.block, MultipoleOptions{}.block);
  EXPECT_EQ(multipole.mass_scaling, MultipoleOptions{}.mass_scaling);
  EXPECT_EQ(multipole.scale, std::nullopt);
  EXPECT_EQ(options_of<Banded>("banded").window, Window{});
}

TEST(AnyAttention, GivesWhatTheMechanismGives) {
  const auto sample = random_sample<double>(heads, 37, 1);
  const auto run = [&](std::string_view line) { return run_forward(AnyAttention<double>(heads, line), sample); };
  EXPECT_TRUE(same_bits(run("softmax:causal"), run_forward(Softmax<double>(heads, {.causal = true}), sample)));
  EXPECT_TRUE(same_bits(run("banded:left=2,right=1"), run_forward(Banded<double>(heads, {.window = {2, 1}}), sample)));
  EXPECT_TRUE(same_bits(run("linear:maps=tanh"),
                        run_forward(Linear<double>(heads, {.feature_maps = {feature_map::Tanh{}}}), sample)));
  EXPECT_TRUE(same_bits(run("nystrom:landmarks=5"), run_forward(Nystrom<double>(heads, {.landmarks = 5}), sample)));
  EXPECT_TRUE(same_bits(run("additive:causal"), run_forward(Additive<double>(heads, {.causal = true}), sample)));
  EXPECT_TRUE(same_bits(run("multipole:block=4,rank=2"),
                        run_forward(Multipole<double>(heads, {.block = 4, .rank = 2}), sample)));
}

TEST(AnyAttention, PrintsALineInShortestFormAsItWas) {
  for (const std::string& line : full_lines) EXPECT_EQ(line_of(line), line);
  for (const std::string line :
       {"softmax", "multipole:block=64,rank=4,causal", "multipole:causal,rank=4", "additive:transform,bias=off",
        "linear:maps=elu+tanh,normalizer=sqrt_length", "linear:eps=1e-6", "linear:eps=0", "softmax:scale=0.1",
        "softmax:scale=1e300", "softmax:scale=0.12345678901234566", "banded:left=0,right=0"}) {
    EXPECT_EQ(line_of(line), line);
  }
}

TEST(AnyAttention, PrintsEveryValueInShortestForm) {
  EXPECT_EQ(line_of(" banded : left = 4,right=04 ,\tcausal=on , scale=0.50\r\n"),
            "banded:left=4,right=4,causal,scale=0.5");
  EXPECT_EQ(line_of("linear:eps=0.000001"), "linear:eps=1e-6");
  EXPECT_EQ(line_of("softmax:causal=off,scale=2.0e+00"), "softmax:causal=off,scale=2");
  EXPECT_EQ(line_of("linear:maps = elu + tanh"), "linear:maps=elu+tanh");
}

TEST(AnyAttention, DescribesAMechanismByWhatDiffersFromTheDefaults) {
  EXPECT_EQ(AnyAttention<float>(Softmax<float>(heads)).line(), "softmax");
  EXPECT_EQ(AnyAttention<float>(Banded<float>(heads, {.window = {2, 7}})).line(), "banded:left=2,right=7");
  for (const std::string& line : full_lines) {
    const AnyAttention<float> described =
        AnyAttention<float>(heads, line).visit([](const auto& mechanism) { return AnyAttention<float>(mechanism); });
    EXPECT_EQ(described.line(), line);
  }
}

TEST(AnyAttention, ReadsAndPrintsNumbersAlikeInEveryLocale) {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Comma));
  const std::string line = line_of("banded:left=12345,scale=0.5");
  std::locale::global(before);
  EXPECT_EQ(line, "banded:left=12345,scale=0.5");
}

TEST(AnyAttention, NamesAnUnknownMechanismAndListsTheKnown) {
  const std::string known = "; known are softmax, banded, linear, nystrom, additive, multipole.";
  EXPECT_EQ(error_of("sofmax"), "nearfar::AnyAttention: unknown mechanism \"sofmax\"" + known);
  EXPECT_EQ(error_of("Softmax:causal"), "nearfar::AnyAttention: unknown mechanism \"Softmax\"" + known);
  EXPECT_EQ(error_of(""), "nearfar::AnyAttention: unknown mechanism \"\"" + known);
  EXPECT_EQ(error_of("softmax causal"), "nearfar::AnyAttention: unknown mechanism \"softmax causal\"" + known);
}

TEST(AnyAttention, NamesAnUnknownOptionAndListsTheKnown) {
  EXPECT_EQ(error_of("multipole:blok=64"),
            "nearfar::AnyAttention: unknown option \"blok\" of multipole; known are block, rank, causal, mass_scaling, "
            "pooling, pooled_queries, query_pooling, scale, levels.");
  for (const std::string line : {"softmax:", "softmax:causal,", "softmax:,causal", "softmax:=1"}) {
    EXPECT_EQ(error_of(line), "nearfar::AnyAttention: unknown option \"\" of softmax; known are causal, scale.");
  }
}

TEST(AnyAttention, RefusesAnOptionThatIsGivenTwice) {
  EXPECT_EQ(error_of("banded:left=1,right=2,left=1"), "nearfar::AnyAttention: option left of banded is given twice.");
}

TEST(AnyAttention, RefusesAValueThatIsNone) {
  const auto must = [](const std::string& option_of_mechanism, const std::string& what) {
    return "nearfar::AnyAttention: option " + option_of_mechanism + " must be " + what + ".";
  };
  for (const std::string text : {"", "x", "64x", "6 4", "6.4", "+64", "0x40", "99999999999999999999", "64=64"}) {
    EXPECT_EQ(error_of("multipole:block=" + text),
              must("block of multipole", "a whole number, but is \"" + text + "\""));
  }
  EXPECT_EQ(error_of("multipole:block"), must("block of multipole", "a whole number, but has no value"));
  for (const std::string text : {"", "x", "0.5x", "1e999", "inf", "nan", "0.5 0.5"}) {
    EXPECT_EQ(error_of("softmax:scale=" + text), must("scale of softmax", "a number, but is \"" + text + "\""));
  }
  EXPECT_EQ(error_of("softmax:scale"), must("scale of softmax", "a number, but has no value"));
  EXPECT_EQ(error_of("softmax:causal=yes"), must("causal of softmax", "on or off, but is \"yes\""));
  EXPECT_EQ(error_of("softmax:causal="), must("causal of softmax", "on or off, but is \"\""));
  EXPECT_EQ(error_of("linear:normalizer=rows"),
            must("normalizer of linear", "one of row_sum, sqrt_length, but is \"rows\""));
  EXPECT_EQ(error_of("linear:maps"), must("maps of linear", "feature maps joined by +, but has no value"));
}

TEST(AnyAttention, NamesAnUnknownFeatureMapAndListsTheKnown) {
  for (const std::string name : {"cosine", ""}) {
    EXPECT_EQ(error_of("linear:maps=elu+" + name),
              "nearfar::Linear: unknown feature map \"" + name +
                  "\", known are elu, elu_flip, tanh, relu, sigmoid, softplus, identity.");
  }
}

TEST(AnyAttention, LeavesWhatDoesNotFitTogetherToTheMechanism) {
  EXPECT_EQ(error_of("multipole:rank=3"), "nearfar::Multipole: rank must divide block, but 3 does not divide 64.");
}

// A mechanism of the user's own, with one option.

struct ConstantOptions {
  double value = 0;
};

template <class T>
class Constant {
 public:
  using Scalar = T;
  using Options = ConstantOptions;

  explicit Constant(const Heads& its_heads, const Options& options = {}) : heads_(its_heads), options_(options) {}

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  void forward(const Inputs<T>&, Tokens<T> out) const { out.matrix().setConstant(static_cast<T>(options_.value)); }

 private:
  Heads heads_;
  Options options_;
};

}  // namespace

template <>
struct nearfar::LineFormat<ConstantOptions> {
  static constexpr std::string_view name = "constant";
  static constexpr std::array options = {nearfar::line_option<&ConstantOptions::value>("value")};
};

namespace {

TEST(AnyAttention, TakesAMechanismOfTheUsersOwn) {
  using Any = AnyAttention<float, Constant<float>>;
  static_assert(Attention<Any> && !DifferentiableAttention<Any>);
  const Any attention(heads, "constant:value=2.5");
  EXPECT_EQ(attention.line(), "constant:value=2.5");
  const auto sample = random_sample<float>(heads, 3, 1);
  EXPECT_TRUE(same_bits(run_forward(attention, sample), Matrix<float>(Matrix<float>::Constant(3, 8, 2.5F))));
  EXPECT_EQ(Any(heads, "softmax").name(), "softmax");
  EXPECT_THROW(Any(heads, "constant:valu=1"), std::invalid_argument);
}

}  // namespace
