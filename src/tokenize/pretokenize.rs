//! How text is split into words before byte-level BPE, for each name that `tokenizer.ggml.pre` can have.
//!
//! The patterns of a rule are applied one after the other, each to the words that the patterns before it have made. A match
//! is a word, and so is the text between two matches. `pieces` relies on what no pattern does: see there.
//!
//! Sources: the patterns are those of the models' own `tokenizer.json` files. Which name has which patterns and flags
//! follows llama.cpp (`llama-vocab.cpp`).

/// How text is split for one or several names of `tokenizer.ggml.pre`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rule {
    names: &'static [&'static str],
    pub(super) patterns: &'static [&'static str],
    /// Whether a word that is a token is taken as that token, without applying merges.
    pub(super) whole_words: bool,
    /// Whether prompts begin with BOS if `tokenizer.ggml.add_bos_token` is absent.
    pub(super) adds_bos: bool,
}

/// The pattern of GPT-2.
pub(crate) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Endings of English contractions. Both cases are written out, because `(?i:…)` would also match `ſ` as `s`.
macro_rules! contractions {
    () => {
        r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    };
}

/// The same endings, as `tokenizer.json` files write them.
const CONTRACTIONS_OF_ANY_CASE: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";

/// The pattern of LLaMA 3.
const LLAMA3: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The pattern of Qwen 2: that of LLaMA 3, except that every digit is a word of its own.
const QWEN2: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The pattern of Mistral's Tekken: words are also split where lower case changes to upper case. (llama.cpp has a simpler
/// pattern, whose ids differ for combining marks and for upper and lower case beyond ASCII.)
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The pattern of GPT-4o (`o200k_base` of tiktoken), which Phi-4-mini has: that of Tekken, but contractions stay with their words, and up to three
/// digits are one word. (llama.cpp's pattern is a simpler one here too.)
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?:",
    contractions!(),
    r")?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?:",
    contractions!(),
    r")?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const RULES: &[Rule] = &[
    Rule {
        names: &["default"],
        patterns: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9]{3}"],
        whole_words: false,
        adds_bos: false,
    },
    Rule {
        names: &[
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum",
        ],
        patterns: &[GPT2],
        whole_words: false,
        adds_bos: false,
    },
    Rule {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        patterns: &[r"\p{N}", GPT2],
        whole_words: false,
        adds_bos: false,
    },
    Rule {
        names: &["falcon"],
        patterns: &[r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9]{3}"],
        whole_words: false,
        adds_bos: false,
    },
    Rule {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        patterns: &[LLAMA3],
        whole_words: true,
        adds_bos: true,
    },
    Rule {
        names: &["dbrx", "smaug-bpe"],
        patterns: &[LLAMA3],
        whole_words: false,
        adds_bos: false,
    },
    Rule {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "megrez",
            "grok-2",
        ],
        patterns: &[QWEN2],
        whole_words: false,
        adds_bos: false,
    },
    Rule {
        names: &["tekken"],
        patterns: &[TEKKEN],
        whole_words: true,
        adds_bos: true,
    },
    Rule {
        names: &["gpt-4o", "llama4"],
        patterns: &[GPT4O],
        whole_words: false,
        adds_bos: false,
    },
];

/// The rule for a name; `None` if the name is not known.
pub(super) fn rule(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.names.contains(&name))
}

/// The name of the rule with these patterns; `None` if there is none. `whole_words` as a rule has it.
pub(crate) fn pre_of(patterns: &[String], whole_words: bool) -> Option<&'static str> {
    let both_cases = |pattern: &String| {
        let group = concat!("(?:", contractions!(), ")?");
        let optional = format!("{CONTRACTIONS_OF_ANY_CASE}?");
        pattern
            .replace(&optional, group)
            .replace(CONTRACTIONS_OF_ANY_CASE, contractions!())
    };
    let patterns: Vec<String> = patterns.iter().map(both_cases).collect();
    let rules = RULES.iter().filter(|rule| rule.patterns == patterns);
    // A word that is a token is nearly always what its merges come to.
    let rule = rules.min_by_key(|rule| rule.whole_words != whole_words)?;
    rule.names.first().copied()
}

/// All known names, separated by commas, for an error message.
pub(super) fn known_names() -> String {
    let names: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_known_as_the_files_of_models_write_them() {
        let of_file = |rule: &Rule| -> Vec<String> {
            let pattern = |pattern: &&str| {
                let optional = concat!("(?:", contractions!(), ")?");
                pattern
                    .replace(optional, &format!("{CONTRACTIONS_OF_ANY_CASE}?"))
                    .replace(contractions!(), CONTRACTIONS_OF_ANY_CASE)
            };
            rule.patterns.iter().map(pattern).collect()
        };
        for name in ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"] {
            let rule = rule(name).unwrap();
            assert_eq!(pre_of(&of_file(rule), rule.whole_words), Some(name));
        }
    }

    #[test]
    fn every_name_leads_to_its_own_rule() {
        for rule_ in RULES {
            for name in rule_.names {
                assert_eq!(rule(name), Some(rule_), "{name} occurs in two rules");
            }
        }
        assert_eq!(rule("no-such-name"), None);
    }
}
