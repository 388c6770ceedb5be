"""The cases of PEFT's suite that cannot apply to CondFT, each with its reason. An entry without a test is an error."""

# Regular expression over the test's id -> reason.
INAPPLICABLE: dict[str, str] = {}
