//! Our own templates, for files that have none.

/// Our own templates, by the names of the families that they are for.
const BUILTIN: &[(&str, &str)] = &[
    ("chatml", include_str!("templates/chatml.jinja")),
    ("deepseek", include_str!("templates/deepseek.jinja")),
    ("gemma", include_str!("templates/gemma.jinja")),
    ("llama2", include_str!("templates/llama2.jinja")),
    ("llama3", include_str!("templates/llama3.jinja")),
    ("mistral", include_str!("templates/mistral.jinja")),
    ("phi3", include_str!("templates/phi3.jinja")),
    ("zephyr", include_str!("templates/zephyr.jinja")),
];

/// The names that [`ChatTemplate::builtin`](super::ChatTemplate::builtin) knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUILTIN.iter().map(|(name, _)| *name)
}

/// The template of this name; `None` if there is none.
pub(super) fn source(name: &str) -> Option<&'static str> {
    let found = BUILTIN.iter().find(|(known, _)| *known == name);
    found.map(|(_, source)| *source)
}
