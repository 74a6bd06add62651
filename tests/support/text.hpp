#pragma once

// TEXT(MACRO): the value of a macro as a string literal.
#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)
