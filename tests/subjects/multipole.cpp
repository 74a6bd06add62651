#include <nearfar/multipole.hpp>
#include <nearfar/reference.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

Matrix<double> naive(const Multipole<double>& attention, const Inputs<double>& inputs) {
  const MultipoleOptions& options = attention.options();
  reference::MultipoleTerms<double> terms{.block = options.block, .rank = options.rank};
  terms.causal = options.causal;
  terms.mass_scaling = options.mass_scaling;
  terms.pooling = options.pooling == Pooling::average               ? reference::Pooling::average
                  : options.pooling == Pooling::grouped_convolution ? reference::Pooling::grouped_convolution
                                                                    : reference::Pooling::hierarchical_convolution;
  terms.pooled_queries = options.pooled_queries;
  terms.all_queries = options.query_pooling == QueryPooling::all;
  terms.scale = options.scale;
  for (const auto& level : attention.parameters().key) terms.key_convolutions.push_back({level.weight, level.bias});
  for (const auto& level : attention.parameters().value) terms.value_convolutions.push_back({level.weight, level.bias});
  return reference::multipole(attention.heads(), inputs, terms);
}

bool add(const std::string& name, const MultipoleOptions& options) {
  const SubjectCase known{.name = name,
                          .causal = options.causal,
                          .padding_is_shortening = options.query_pooling == QueryPooling::unmasked,
                          .takes_infinite_scores = options.pooling == Pooling::average,
                          // Blocks of few tokens make many levels; convolutions of random weights, large scores.
                          .accuracy = options.pooling != Pooling::average ? 1e-4
                                      : options.block < 64                ? 1e-5
                                                                          : 2e-6};
  return add_subject<Multipole>(known, options, naive);
}

const bool added =
    add("multipole", {.block = 4, .rank = 2}) && add("multipole_causal", {.block = 6, .rank = 3, .causal = true}) &&
    add("multipole_block_64", {.block = 64, .rank = 4}) &&
    add("multipole_without_mass", {.block = 5, .rank = 1, .mass_scaling = false}) &&
    add("multipole_grouped_causal",
        {.block = 4, .rank = 2, .causal = true, .pooling = Pooling::grouped_convolution, .levels = 10}) &&
    add("multipole_hierarchical",
        {.block = 8, .rank = 4, .pooling = Pooling::hierarchical_convolution, .levels = 10}) &&
    add("multipole_hierarchical_causal",
        {.block = 6, .rank = 2, .causal = true, .pooling = Pooling::hierarchical_convolution, .levels = 10}) &&
    add("multipole_pooled_queries", {.block = 8, .rank = 2, .pooled_queries = true}) &&
    add("multipole_pooled_queries_of_all",
        {.block = 4, .rank = 4, .pooled_queries = true, .query_pooling = QueryPooling::all});

}  // namespace
}  // namespace nearfar::test
