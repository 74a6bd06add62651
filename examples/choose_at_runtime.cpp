// As text_encoder, with mechanisms chosen by lines of text.
//
//   choose_at_runtime FILE LINE... [--length N]
//
//   choose_at_runtime README.md banded:left=16,right=16 linear:maps=elu+tanh multipole:block=32,rank=8

#include "comparison.hpp"

#include <exception>

int main(int count, char** values) try {
  using namespace encoder;
  const Arguments arguments(count, values);
  if (arguments.words.size() < 2) throw std::invalid_argument("usage: choose_at_runtime FILE LINE... [--length N]");

  // All lines are read before the first one runs, so that a mistake in the last costs no time.
  std::vector<nearfar::AnyAttention<float>> attentions;
  for (auto line = arguments.words.begin() + 1; line != arguments.words.end(); ++line) {
    attentions.emplace_back(Comparison::heads, *line);
  }
  const Comparison comparison(read_text(arguments.words.front(), arguments.length));
  for (const auto& attention : attentions) comparison.add(attention.line(), attention);
} catch (const std::exception& error) {
  std::fprintf(stderr, "choose_at_runtime: %s\n", error.what());
  return 1;
}
