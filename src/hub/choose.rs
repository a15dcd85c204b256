//! Which files of many are the model: a GGUF file of the type that is wanted, all its parts, or a folder with safetensors.

use super::errors::NameError;
use super::names::Wanted;

/// Types of files in the order in which they are taken where none is asked for.
const TYPES: [&str; 37] = [
    "Q4_K_M", "Q4_K_S", "Q4_K_XL", "Q4_K_L", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "MXFP4",
    "Q5_K_M", "Q5_K_S", "Q5_K_XL", "Q5_K_L", "Q5_K", "Q5_1", "Q5_0", "Q6_K", "Q6_K_L", "Q6_K_XL",
    "Q8_0", "Q8_K_XL", "Q3_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q3_K", "IQ3_M", "IQ3_S", "IQ3_XS",
    "IQ3_XXS", "BF16", "F16", "F32", "Q2_K_L", "Q2_K_XL", "Q2_K",
];

/// What is a folder's model in safetensors, beside the weights: those without which there is none, and those that may be missing.
const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 3] = [
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
];
pub(super) const INDEX: &str = "model.safetensors.index.json";
const WHOLE: &str = "model.safetensors";

/// The files that are the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Choice {
    Gguf {
        /// All parts, in their order; one for a file that is not split.
        files: Vec<String>,
        /// Which of them is opened.
        opened: String,
        /// Whether it is another than what a user would expect: not of the usual type, or one of several of it.
        is_notable: bool,
    },
    /// A model in safetensors. The files that its index names, where it has one, come later.
    Safetensors { files: Vec<String>, index: bool },
}

/// The files of a model among all names of a repository or folder, `of`.
///
/// # Errors
/// If there is no such file, or a part is missing; the error lists what there is.
pub(super) fn choose(of: &str, names: &[String], wanted: &Wanted) -> Result<Choice, NameError> {
    let models = models(names);
    if let Wanted::File(file) = wanted {
        let Some(found) = names.iter().find(|name| *name == file) else {
            return Err(NameError::NoFile {
                repository: of.to_owned(),
                file: file.clone(),
                there: some_of(&models, names),
            });
        };
        return gguf(of, names, found, false);
    }
    if models.is_empty() {
        return match (safetensors(of, names)?, wanted) {
            (Some(choice), Wanted::Usual) => Ok(choice),
            (Some(_), Wanted::Type(kind)) => Err(NameError::NoType {
                repository: of.to_owned(),
                wanted: kind.clone(),
                there: vec!["a model in safetensors, which is named without a type".to_owned()],
            }),
            _ => Err(NameError::NothingUsable {
                repository: of.to_owned(),
                there: some_of(&[], names),
            }),
        };
    }
    let (found, is_usual) = match wanted {
        Wanted::Type(kind) => (of_type(&models, kind), true),
        _ => {
            let usual = of_type(&models, TYPES[0]);
            match usual.is_empty() {
                true => (nearest(&models), false),
                false => (usual, true),
            }
        }
    };
    match (found.first(), wanted) {
        (Some(first), _) => gguf(of, names, first, !is_usual || found.len() > 1),
        (None, Wanted::Type(kind)) => Err(NameError::NoType {
            repository: of.to_owned(),
            wanted: kind.clone(),
            there: some_of(&models, names),
        }),
        (None, _) => unreachable!("one of the models is the nearest"),
    }
}

/// The names of model files: of those that are split only the first parts, and nothing that only goes with a model.
pub(super) fn models(names: &[String]) -> Vec<&str> {
    let is_model = |name: &&str| {
        let lower = name.to_ascii_lowercase();
        let file = lower.rsplit('/').next().unwrap_or_default();
        let matrix = file.contains("imatrix") && type_of(name).is_none();
        lower.ends_with(".gguf")
            && !file.contains("mmproj")
            && !matrix
            && split(name).is_none_or(|(_, number, _)| number == 1)
    };
    let mut models: Vec<&str> = names.iter().map(String::as_str).filter(is_model).collect();
    // Shorter names are those without extras.
    models.sort_by_key(|name| (is_dynamic(name), name.len(), *name));
    models
}

/// Mixtures of another maker's recipe, whose names have this mark before a type.
fn is_dynamic(name: &str) -> bool {
    name.to_ascii_uppercase().contains("UD-")
}

/// Models of a type, the first one first.
fn of_type<'n>(models: &[&'n str], kind: &str) -> Vec<&'n str> {
    let upper = kind.to_ascii_uppercase();
    let dynamic = upper.strip_prefix("UD-");
    let plain = match dynamic.unwrap_or(&upper) {
        "FP16" => "F16",
        "FP32" => "F32",
        other => other,
    };
    let models = models.iter().copied();
    let fits = |name: &&str| match type_of(name) {
        Some(found) => found == plain,
        None => false,
    };
    let exact: Vec<&str> = models
        .clone()
        .filter(|name| fits(name) && (dynamic.is_none() || is_dynamic(name)))
        .collect();
    if !exact.is_empty() {
        return exact;
    }
    // Something that is in the names, but in no list of types.
    let all = models.filter(|name| {
        let name = name.to_ascii_uppercase();
        has_word(&name, &upper) && !name.contains(&format!("{upper}_"))
    });
    all.collect()
}

/// Models of the first type in the order that there is any of; else all.
fn nearest<'n>(models: &[&'n str]) -> Vec<&'n str> {
    let all = TYPES.iter().map(|kind| of_type(models, kind));
    let mut some = all.filter(|found| !found.is_empty());
    some.next().unwrap_or_else(|| models.to_vec())
}

/// Whether a word stands in a name with no letter or digit beside it.
fn has_word(name: &str, word: &str) -> bool {
    let outside = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric());
    name.match_indices(word).any(|(at, _)| {
        let (before, behind) = (&name[..at], &name[at + word.len()..]);
        outside(before.chars().next_back()) && outside(behind.chars().next())
    })
}

/// The type that a file's name tells, its own before its folder's.
fn type_of(name: &str) -> Option<&'static str> {
    let upper = name.to_ascii_uppercase();
    let parts = upper.rsplit('/');
    parts
        .filter_map(|part| {
            // `Q4_K` is in `Q4_K_M` too.
            let all = TYPES.iter().filter(|kind| has_word(part, kind));
            all.max_by_key(|kind| kind.len()).copied()
        })
        .next()
        .or_else(|| {
            let full = upper.rsplit('/').next()?;
            ["FP16", "FP32"]
                .iter()
                .position(|kind| has_word(full, kind))
                .map(|place| ["F16", "F32"][place])
        })
}

/// `name-00001-of-00003.gguf`: what stands before the numbers, and these.
fn split(name: &str) -> Option<(&str, usize, usize)> {
    let end = name.len().checked_sub(".gguf".len())?;
    let (stem, ending) = name.split_at_checked(end)?;
    if !ending.eq_ignore_ascii_case(".gguf") {
        return None;
    }
    let (before, count) = stem.rsplit_once("-of-")?;
    let (before, number) = before.rsplit_once('-')?;
    let read = |digits: &str| match digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit())
    {
        true => digits.parse().ok(),
        false => None,
    };
    Some((before, read(number)?, read(count)?))
}

/// A GGUF file with all its parts.
fn gguf(of: &str, names: &[String], file: &str, is_notable: bool) -> Result<Choice, NameError> {
    let files = match split(file) {
        None => vec![file.to_owned()],
        Some((before, _, count)) => {
            let ending = &file[file.len() - ".gguf".len()..];
            let part = |n| format!("{before}-{n:05}-of-{count:05}{ending}");
            let parts: Vec<String> = (1..=count).map(part).collect();
            if let Some(missing) = parts.iter().find(|part| !names.contains(part)) {
                return Err(NameError::Incomplete {
                    repository: of.to_owned(),
                    file: file.to_owned(),
                    missing: missing.clone(),
                });
            }
            parts
        }
    };
    Ok(Choice::Gguf {
        opened: files.first().cloned().unwrap_or_else(|| file.to_owned()),
        files,
        is_notable,
    })
}

/// The files of a model in safetensors; `None` if there is none.
fn safetensors(of: &str, names: &[String]) -> Result<Option<Choice>, NameError> {
    let has = |name: &&str| names.iter().any(|there| there == name);
    let weights = [WHOLE, INDEX].into_iter().find(has);
    let (Some(weights), true) = (weights, has(&NEEDED[0])) else {
        return Ok(None);
    };
    if let Some(missing) = NEEDED.iter().find(|name| !has(name)) {
        return Err(NameError::Incomplete {
            repository: of.to_owned(),
            file: weights.to_owned(),
            missing: (*missing).to_owned(),
        });
    }
    let mut files: Vec<String> = NEEDED.map(str::to_owned).to_vec();
    files.extend(
        OPTIONAL
            .iter()
            .filter(|name| has(name))
            .map(|n| (*n).to_owned()),
    );
    files.push(weights.to_owned());
    Ok(Some(Choice::Safetensors {
        files,
        index: weights == INDEX,
    }))
}

/// Names for an error: the models, or else everything.
fn some_of(models: &[&str], names: &[String]) -> Vec<String> {
    match models.is_empty() {
        true => names.to_vec(),
        false => {
            let mut models: Vec<String> = models.iter().map(|n| (*n).to_owned()).collect();
            models.sort();
            models
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(names: &[&str], wanted: &Wanted) -> Result<(String, bool), NameError> {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        match choose("org/repo", &names, wanted)? {
            Choice::Gguf {
                opened, is_notable, ..
            } => Ok((opened, is_notable)),
            Choice::Safetensors { files, .. } => Ok((files.join(" "), false)),
        }
    }

    fn kind(text: &str) -> Wanted {
        Wanted::Type(text.to_owned())
    }

    const MANY: [&str; 9] = [
        "README.md",
        "m-F16.gguf",
        "m-Q4_K_S.gguf",
        "m-UD-Q4_K_M.gguf",
        "m-Q4_K_M.gguf",
        "m-IQ4_XS.gguf",
        "m-Q8_0.gguf",
        "mmproj-F16.gguf",
        "imatrix.gguf",
    ];

    #[test]
    fn the_usual_type_is_taken_and_else_the_nearest_one_and_that_is_told() {
        let usual = |names: &[&str]| opened(names, &Wanted::Usual).expect("a model");
        // Both that are of it are told.
        assert_eq!(usual(&MANY), ("m-Q4_K_M.gguf".to_owned(), true));
        let names = ["a.Q4_K_M.gguf", "a.Q8_0.gguf"];
        assert_eq!(usual(&names), ("a.Q4_K_M.gguf".to_owned(), false));
        let names = ["a_f16.gguf", "a_q8_0.gguf", "a_q3_k_m.gguf"];
        assert_eq!(usual(&names), ("a_q8_0.gguf".to_owned(), true));
        let names = ["model.gguf", "mmproj-model-Q4_K_M.gguf"];
        assert_eq!(usual(&names), ("model.gguf".to_owned(), true));
    }

    #[test]
    fn a_type_is_told_from_longer_ones_and_from_parts_of_words() {
        let of = |wanted: &str| opened(&MANY, &kind(wanted)).map(|(name, _)| name).ok();
        assert_eq!(of("q4_k_s").as_deref(), Some("m-Q4_K_S.gguf"));
        assert_eq!(of("UD-Q4_K_M").as_deref(), Some("m-UD-Q4_K_M.gguf"));
        assert_eq!(of("F16").as_deref(), Some("m-F16.gguf"));
        assert_eq!(of("fp16").as_deref(), Some("m-F16.gguf"));
        // IQ4_XS ends like it, and BF16 would.
        for none in ["Q4_XS", "Q4_K", "16", "BF16", "Q5_K_M"] {
            assert_eq!(of(none), None, "{none}");
        }
        let error = opened(&MANY, &kind("Q5_K_M"))
            .expect_err("none")
            .to_string();
        assert!(
            error.contains("m-Q8_0.gguf") && !error.contains("mmproj"),
            "{error}"
        );
        let odd = ["m-MIX7.gguf", "m-Q4_K_M.gguf"];
        assert_eq!(opened(&odd, &kind("mix7")).expect("one").0, "m-MIX7.gguf");
    }

    #[test]
    fn all_parts_belong_together_and_folders_name_types() {
        let names = [
            "Q4_K_M/m-00002-of-00002.gguf",
            "Q4_K_M/m-00001-of-00002.gguf",
            "Q8_0/m-00001-of-00002.gguf",
        ];
        let all: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        for wanted in [Wanted::Usual, Wanted::File(all[0].clone())] {
            let choice = choose("org/repo", &all, &wanted).expect("a model");
            let expected = Choice::Gguf {
                files: vec![all[1].clone(), all[0].clone()],
                opened: all[1].clone(),
                is_notable: false,
            };
            assert_eq!(choice, expected);
        }
        let error = opened(&names, &kind("Q8_0")).expect_err("a part is missing");
        assert!(error.to_string().contains("Q8_0/m-00002-of-00002.gguf"));
    }

    #[test]
    fn safetensors_are_taken_where_there_is_no_gguf() {
        let mut names = vec![
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "x.bin",
        ];
        let found = opened(&names, &Wanted::Usual).expect("a model").0;
        assert_eq!(found, "config.json tokenizer.json model.safetensors");
        let error = opened(&names, &kind("Q4_K_M")).expect_err("no types");
        assert!(error.to_string().contains("safetensors"), "{error}");
        names.remove(1);
        let error = opened(&names, &Wanted::Usual).expect_err("no tokenizer");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
        names.remove(0);
        let error = opened(&names, &Wanted::Usual).expect_err("no config");
        assert!(error.to_string().contains("x.bin"), "{error}");
    }
}
