#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << path << " cannot be read";
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> blocks_of(const std::string& markdown, const std::string& language) {
  const std::string fence = "```" + language + "\n";
  std::vector<std::string> blocks;
  for (std::size_t at = 0; (at = markdown.find(fence, at)) != std::string::npos;) {
    const std::size_t begin = at + fence.size();
    at = markdown.find("```", begin);
    blocks.push_back(markdown.substr(begin, at - begin));
  }
  return blocks;
}

TEST(Readme, BeginsWithTheQuickstart) {
  const fs::path top = NEARFAR_SOURCE_DIR;
  const std::vector<std::string> blocks = blocks_of(text_of(top / "README.md"), "cpp");
  ASSERT_FALSE(blocks.empty());
  EXPECT_EQ(blocks.front(), text_of(top / "examples/quickstart.cpp"));
}

TEST(Readme, ShowsNoCodeThatTheExamplesDoNotCompile) {
  const fs::path top = NEARFAR_SOURCE_DIR;
  std::string examples;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(top / "examples")) {
    if (entry.path().extension() == ".cpp" || entry.path().extension() == ".hpp") examples += text_of(entry.path());
  }
  for (const std::string& block : blocks_of(text_of(top / "README.md"), "cpp")) {
    EXPECT_NE(examples.find(block), std::string::npos) << "no file of examples/ holds\n" << block;
  }
}

}  // namespace
