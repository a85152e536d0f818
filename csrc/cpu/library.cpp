#include "../library.h"

#include <exception>
#include <set>
#include <string>

#include "../torch.h"

namespace infsa {
namespace {

template <typename Function> bool answer_with(const char** answer, const Function& function) {
  static thread_local std::string text;
  bool returned = true;
  try {
    text = function();
  } catch (const std::exception& error) {
    text = error.what();
    returned = false;
  }
  *answer = text.c_str();
  return returned;
}

std::string ask(const std::string& function) {
  if (function == "isa_name") return cpu::isa_name();
  if (function == "release_memory") return std::to_string(cpu::release_memory());
  if (function == "kept_memory") return std::to_string(cpu::kept_memory());
  if (function == "most_kept_memory") return std::to_string(cpu::most_kept_memory());
  throw std::invalid_argument("there is no function " + function);
}

std::vector<Registration>& registrations() {
  static std::vector<Registration> all;  // made by the first of its users, which are other files' constants
  return all;
}

}  // namespace

bool register_later(const Registration& registration) {
  registrations().push_back(registration);
  return true;
}

}  // namespace infsa

bool infsa_register(const char* name_space, const char** answer) {
  return infsa::answer_with(answer, [&] {
    using torch::stable::detail::StableLibrary;
    static std::set<std::string> registered;
    if (!registered.insert(name_space).second) return "";
    for (const auto& [key, function, file, line] : infsa::registrations()) {
      // Kept for good: the operators outlive everything else.
      auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name_space, key, file, line);
      function(*library);
    }
    return "";
  });
}

bool infsa_ask(const char* function, const char** answer) {
  return infsa::answer_with(answer, [&] { return infsa::ask(function); });
}
