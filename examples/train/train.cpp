// Trains a small transformer with any of nearfar's mechanisms.
//
//   train copy|listops|fashion --attention LINE [OPTION VALUE]...
//   train bytes [FILE]...      --attention LINE [OPTION VALUE]...
//
//   train copy --attention fmm:left=19,right=0,maps=elu+tanh,causal --length 256 --out runs/copy-fmm

#include "bytes.hpp"
#include "copy.hpp"
#include "fashion.hpp"
#include "listops.hpp"
#include "trainer.hpp"

#include <nearfar/nearfar.hpp>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using namespace train;
using Attention = nearfar::AnyAttention<float>;

constexpr const char* usage = R"(usage: train TASK --attention LINE [OPTION]...

tasks
  copy               s 0 s with a random s: predict the second s
  listops            the value of a nested list of operators, Long Range Arena's
  bytes [FILE]...    the next byte of text; without a FILE that of Debian's package perl-doc
  fashion            Fashion-MNIST as rows of 784 pixels, from Debian's package dataset-fashion-mnist

options
  --attention LINE   a mechanism and its options, such as multipole:block=64,rank=4,causal
  --start NAME=X     lets the mechanism's parameters whose name begins with NAME start at X
  --out DIR          where log.csv and checkpoint are left (runs/TASK-MECHANISM)
  --resume           goes on from DIR's checkpoint, if there is one
  --data DIR         where listops is kept, once generated ($XDG_CACHE_HOME/nearfar or ~/.cache/nearfar)
  --threads N        threads of the attention (all); results do not depend on it

and of the setting, whose defaults the task has
  --steps --batch --length --piece --seed --evaluate-every --width --layers --heads --feed-forward --dropout
  --rate --warm-up --clip
)";

/// An error in the command line.
[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence + " See train --help."); }

template <class Number>
std::string text_of(Number number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, number).ptr};
}

template <class Number>
Number number_from(const std::string& option, const std::string& text) {
  Number number{};
  bool whole = false;
  std::string expected = "a number";
  if constexpr (std::is_integral_v<Number>) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    whole = error == std::errc{} && end == text.data() + text.size();
    expected = "a whole number";
    if (std::is_unsigned_v<Number>) expected += " from 0 to " + text_of(std::numeric_limits<Number>::max());
  } else {
    std::istringstream stream(text);
    stream >> number;
    whole = !stream.fail() && stream.peek() == std::istringstream::traits_type::eof();
  }
  if (!whole) refuse(option + " must be " + expected + ", but is \"" + text + "\".");
  return number;
}

/// A word as a shell reads it.
std::string quoted(const std::string& word) {
  if (!word.empty() && word.find_first_of(" \t\n'\"\\`$&|;<>()[]{}*?!#~^") == std::string::npos) return word;
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? "'\\''" : std::string(1, c);
  return text + "'";
}

/// Calls visit(option, number) for each number of a setting.
template <class Of, class Visit>
void for_each_number(Of& setting, Visit&& visit) {
  visit("--steps", setting.steps);
  visit("--batch", setting.batch);
  visit("--length", setting.length);
  visit("--piece", setting.piece);
  visit("--seed", setting.seed);
  visit("--evaluate-every", setting.evaluate_every);
  visit("--width", setting.width);
  visit("--layers", setting.layers);
  visit("--heads", setting.heads);
  visit("--feed-forward", setting.feed_forward);
  visit("--dropout", setting.dropout);
  visit("--rate", setting.rate);
  visit("--warm-up", setting.warm_up);
  visit("--clip", setting.clip);
}

fs::path default_data() {
  const auto folder = [](const char* variable) {
    const char* const value = std::getenv(variable);
    return fs::path(value != nullptr ? value : "");
  };
  if (const fs::path cache = folder("XDG_CACHE_HOME"); !cache.empty()) return cache / "nearfar";
  if (const fs::path home = folder("HOME"); !home.empty()) return home / ".cache/nearfar";
  return fs::temp_directory_path() / "nearfar";
}

/// The mechanism's parameters whose name begins with `name` start at `value`.
struct Start {
  std::string name;
  float value;
};

struct Command {
  std::string task;
  std::vector<std::string> files;
  std::string attention;
  std::vector<Start> starts;
  fs::path out, data = default_data();
  bool resume = false;
  int threads = 0;
  Setting setting;

  explicit Command(const std::vector<std::string>& words) {
    if (words.front().starts_with("-")) refuse("the first word must be a task.");
    task = words.front();
    setting = default_setting();
    for (std::size_t i = 1; i < words.size(); ++i) {
      const std::string& word = words[i];
      if (word == "--resume") {
        resume = true;
      } else if (word.starts_with("--")) {
        if (i + 1 == words.size()) refuse(word + " needs a value.");
        set(word, words[++i]);
      } else {
        files.push_back(word);
      }
    }
    if (attention.empty()) refuse("--attention is missing.");
    if (task != "bytes" && !files.empty()) refuse(task + " takes no file, but " + files.front() + " is given.");
    for_each_number(setting, [](std::string_view option, auto number) {
      const bool may_be_zero =
          option == "--seed" || option == "--dropout" || option == "--warm-up" || option == "--clip";
      if (number > 0 || (number == 0 && may_be_zero)) return;
      refuse(std::string(option) + " must be more than 0, but is " + text_of(number) + ".");
    });
    if (setting.width % setting.heads != 0) {
      refuse("--heads must divide --width, but " + text_of(setting.heads) + " does not divide " +
             text_of(setting.width) + ".");
    }
  }

  std::unique_ptr<Task> make_task() const {
    if (task == "copy") return std::make_unique<CopyTask>(setting);
    if (task == "bytes") return std::make_unique<BytesTask>(setting, files);
    if (task == "fashion") return std::make_unique<FashionTask>(setting);
    return std::make_unique<ListOpsTask>(setting, data);
  }

  Attention make_attention(const Task& of) const {
    const nearfar::Heads heads{setting.heads, setting.heads, setting.width / setting.heads};
    Attention made(heads, attention);
    const bool causal = made.visit([](const auto& mechanism) {
      if constexpr (requires { mechanism.options().causal; }) return mechanism.options().causal;
      return false;
    });
    if (of.causal() && !causal) refuse(task + " needs causal attention, but " + made.line() + " is not.");
    for (const Start& start : starts) {
      bool known = false;
      made.parameters().for_each([&](const std::string& parameter, auto& matrix) {
        if (!parameter.starts_with(start.name)) return;
        matrix.setConstant(start.value);
        known = true;
      });
      if (!known) refuse("--start: " + made.line() + " has no parameter whose name begins with " + start.name + ".");
    }
    return made;
  }

  /// The words that make this run, of what make_attention made, again, wherever it writes.
  std::string run(const Attention& made) const {
    std::string words = task;
    for (const std::string& file : files) words += ' ' + quoted(file);
    words += " --attention " + made.line();
    for (const Start& start : starts) words += " --start " + start.name + '=' + text_of(start.value);
    for_each_number(setting, [&](std::string_view option, auto number) {
      words += ' ' + std::string(option) + ' ' + text_of(number);
    });
    return words;
  }

 private:
  Setting default_setting() const {
    if (task == "copy") return CopyTask::setting();
    if (task == "listops") return ListOpsTask::setting();
    if (task == "bytes") return BytesTask::setting();
    if (task == "fashion") return FashionTask::setting();
    refuse("unknown task " + task + ", known are copy, listops, bytes, fashion.");
  }

  void set(const std::string& option, const std::string& value) {
    if (option == "--attention") {
      attention = value;
    } else if (option == "--start") {
      const std::size_t equals = value.find('=');
      if (equals == std::string::npos) refuse("--start must be NAME=X, but is \"" + value + "\".");
      starts.push_back({value.substr(0, equals), number_from<float>(option, value.substr(equals + 1))});
    } else if (option == "--out") {
      out = value;
    } else if (option == "--data") {
      data = value;
    } else if (option == "--threads") {
      threads = number_from<int>(option, value);
    } else {
      bool known = false;
      for_each_number(setting, [&]<class Number>(std::string_view name, Number& number) {
        if (option != name) return;
        number = number_from<Number>(option, value);
        known = true;
      });
      if (!known) refuse("unknown option " + option + ".");
    }
  }
};

}  // namespace

int main(int count, char** values) try {
  const std::vector<std::string> words(values + 1, values + count);
  const bool help =
      std::any_of(words.begin(), words.end(), [](auto& word) { return word == "--help" || word == "-h"; });
  if (help || words.empty()) {
    std::fprintf(help ? stdout : stderr, "%s", usage);
    return help ? 0 : 1;
  }
  Command command(words);
  const std::unique_ptr<Task> task = command.make_task();
  const Attention attention = command.make_attention(*task);
  if (command.out.empty()) command.out = fs::path("runs") / (command.task + "-" + std::string(attention.name()));

  const std::string run = command.run(attention);
  Trainer<Attention> trainer(*task, command.setting, attention, run, command.threads);
  make_folder(command.out);
  const fs::path checkpoint = command.out / "checkpoint";
  if (fs::exists(checkpoint)) {
    if (!command.resume) refuse(command.out.string() + " holds a run already: --resume goes on with it.");
    trainer.load(checkpoint);
  }
  write_file(command.out / "command", "train " + run + "\n");

  stop_at_signals();
  if (!trainer.run(command.out)) {
    std::printf("stopped after step %td; --resume goes on from %s\n", trainer.step(), checkpoint.c_str());
    return 130;
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "train: %s\n", error.what());
  return 1;
}
