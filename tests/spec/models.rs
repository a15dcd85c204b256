//! `flapjack models`: what is in the cache folder, and taking it away.

use std::fs::{self, File};
use std::path::Path;
use std::process::Output;
use std::time::{Duration, SystemTime};

use crate::common::program::{program, run_with_input, stderr, stdout, succeeded};
use flapjack::hub::{self, DEFAULT_MODEL};
use serde_json::Value;
use tempfile::TempDir;

/// A cache folder with the default model's name, one of a hub in folders, and what is no model.
fn cache() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: usize, hours: u64| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, vec![0; bytes]).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        let time = SystemTime::now() - Duration::from_secs(hours * 3600);
        file.set_modified(time).unwrap();
    };
    write(DEFAULT_MODEL.file_name, 2_000_000, 72);
    write(&format!("{}.verified", DEFAULT_MODEL.file_name), 1, 5);
    write("org/some-model/small.Q4_0.gguf", 3_000_000, 1);
    write("mine.gguf", 1_000_000, 1);
    write(".hidden.gguf", 10, 1);
    write("profiles/no-model.gguf", 10, 1);
    write("notes.txt", 10, 1);
    folder
}

fn flapjack(folder: &Path, arguments: &str) -> Output {
    let mut command = program();
    command.args(arguments.split(' '));
    command.env("FLAPJACK_CACHE", folder);
    run_with_input(command, b"")
}

fn names(folder: &Path) -> Vec<String> {
    let text = succeeded(&flapjack(folder, "models --json")).0;
    let json: Value = serde_json::from_str(&text).unwrap();
    let models = json["models"].as_array().unwrap().iter();
    models
        .map(|model| model["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn models_are_listed_with_size_and_age() {
    let folder = cache();
    let text = succeeded(&flapjack(folder.path(), "models")).0;
    for words in [
        folder.path().to_str().unwrap(),
        "2.00 MB  used 5 hours ago     fetched 3 days ago      SmolLM2-135M-Instruct.Q4_1.gguf  (the default model)",
        "3.00 MB  used ",
        "org/some-model/small.Q4_0.gguf\n",
        "mine.gguf\n",
        "6.00 MB  together",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    for words in ["hidden", "no-model", "notes"] {
        assert!(!text.contains(words), "{words}: {text}");
    }
    let text = succeeded(&flapjack(folder.path(), "models --json")).0;
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["bytes"], 6_000_000);
    assert_eq!(json["folder"], folder.path().to_str().unwrap());
    let model = &json["models"][0];
    assert_eq!(
        (&model["name"], &model["bytes"], &model["default"]),
        (
            &DEFAULT_MODEL.file_name.into(),
            &2_000_000.into(),
            &true.into()
        )
    );
    let (used, fetched) = (&model["last_used"], &model["fetched"]);
    assert!(used.as_u64().unwrap() > fetched.as_u64().unwrap() + 200_000);
    assert_eq!(json["models"].as_array().unwrap().len(), 3);
}

#[test]
fn a_folder_without_models_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let text = succeeded(&flapjack(&folder.path().join("nowhere"), "models")).0;
    assert!(text.contains("0.00 MB  together"), "{text}");
}

#[test]
fn names_cannot_control_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a\u{1b}[31m\tb.gguf"), "").unwrap();
    let text = succeeded(&flapjack(folder.path(), "models")).0;
    assert!(!text.contains(['\u{1b}', '\t']), "{text:?}");
    let said = stderr(&flapjack(folder.path(), "models remove c"));
    assert!(!said.contains(['\u{1b}', '\t']), "{said:?}");
}

#[test]
fn a_model_is_removed_by_its_name_or_the_last_part_of_it() {
    for name in [
        "org/some-model/small.Q4_0.gguf",
        "small.Q4_0.gguf",
        "small.Q4_0",
        "PATH/org/some-model/small.Q4_0.gguf",
    ] {
        let folder = cache();
        let name = name.replace("PATH", folder.path().to_str().unwrap());
        let text = succeeded(&flapjack(folder.path(), &format!("models remove {name}"))).0;
        assert!(
            text.contains("removed ") && text.ends_with("small.Q4_0.gguf, 3.00 MB\n"),
            "{text}"
        );
        assert_eq!(names(folder.path()), [DEFAULT_MODEL.file_name, "mine.gguf"]);
        // Nor are folders left that have nothing in them.
        assert!(!folder.path().join("org").exists());
    }
    let folder = cache();
    let text = succeeded(&flapjack(
        folder.path(),
        "models rm mine SmolLM2-135M-Instruct.Q4_1",
    ))
    .0;
    assert_eq!(text.lines().count(), 2, "{text}");
    assert_eq!(names(folder.path()), ["org/some-model/small.Q4_0.gguf"]);
    let marker = format!("{}.verified", DEFAULT_MODEL.file_name);
    assert!(!folder.path().join(marker).exists());
    assert!(folder.path().join("notes.txt").exists());
}

#[test]
fn what_is_no_model_of_the_cache_is_not_removed() {
    let folder = cache();
    let outside = tempfile::tempdir().unwrap();
    let other = outside.path().join("other.gguf");
    fs::write(&other, "").unwrap();
    let other = other.to_str().unwrap();
    for name in [
        other,
        "../other.gguf",
        "notes.txt",
        "profiles/no-model.gguf",
        ".hidden.gguf",
        "org",
        "",
        ".",
    ] {
        // The one that is there stays as well.
        let output = flapjack(folder.path(), &format!("models remove mine {name}"));
        assert_eq!(output.status.code(), Some(1), "{name}: {}", stdout(&output));
        let said = stderr(&output);
        for words in ["there is no model", "mine.gguf", "SmolLM2"] {
            assert!(said.contains(words), "{name}: {words} in {said}");
        }
    }
    assert_eq!(names(folder.path()).len(), 3);
    assert!(Path::new(other).exists() && folder.path().join("notes.txt").exists());
    assert_eq!(
        flapjack(folder.path(), "models remove").status.code(),
        Some(2)
    );
}

#[test]
fn a_name_of_several_models_is_asked_back() {
    let folder = cache();
    let second = folder.path().join("other/small.Q4_0.gguf");
    fs::create_dir_all(second.parent().unwrap()).unwrap();
    fs::write(&second, "").unwrap();
    let output = flapjack(folder.path(), "models remove small.Q4_0");
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.contains("org/some-model/small.Q4_0.gguf or other/small.Q4_0.gguf"),
        "{said}"
    );
    assert!(second.exists());
}

#[test]
fn a_model_that_is_being_fetched_stays() {
    let folder = cache();
    let lock = folder
        .path()
        .join(format!(".{}.lock", DEFAULT_MODEL.file_name));
    let lock = File::create(lock).unwrap();
    lock.lock().unwrap();
    let name = format!("models remove {}", DEFAULT_MODEL.file_name);
    let output = flapjack(folder.path(), &name);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("fetching"), "{}", stderr(&output));
    lock.unlock().unwrap();
    succeeded(&flapjack(folder.path(), &name));
}

/// A link leads to a file of somebody else's.
#[test]
#[cfg(unix)]
fn removing_a_link_leaves_what_it_leads_to_and_links_to_folders_are_not_followed() {
    let folder = cache();
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("real.gguf");
    fs::write(&file, "").unwrap();
    std::os::unix::fs::symlink(&file, folder.path().join("link.gguf")).unwrap();
    std::os::unix::fs::symlink(outside.path(), folder.path().join("linked")).unwrap();
    assert!(!names(folder.path()).contains(&"linked/real.gguf".to_owned()));
    succeeded(&flapjack(folder.path(), "models remove link"));
    assert!(file.exists() && !folder.path().join("link.gguf").exists());
}

#[test]
fn the_path_of_a_model_is_printed_alone() {
    let folder = cache();
    let text = succeeded(&flapjack(folder.path(), "models path small.Q4_0")).0;
    let path = folder.path().join("org/some-model/small.Q4_0.gguf");
    assert_eq!(text, format!("{}\n", path.display()));
}

/// Using the default model is noted, so that what was not used for long can be told.
#[test]
fn use_is_noted_in_the_marker() {
    let model = crate::common::default_model();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(DEFAULT_MODEL.file_name);
    // A link: the model is large.
    if fs::hard_link(&model, &file).is_err() {
        fs::copy(&model, &file).unwrap();
    }
    let package = DEFAULT_MODEL;
    let never = |_: &hub::Package, _: &Path, _: &mut hub::Steps| panic!("it is there");
    let ensure = || {
        hub::ensure(&package, folder.path(), &never, &mut |_| {
            std::ops::ControlFlow::Continue(())
        })
    };
    ensure().unwrap();
    let marker = folder
        .path()
        .join(format!("{}.verified", DEFAULT_MODEL.file_name));
    let before = fs::read(&marker).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(1_000_000);
    let time = File::options().write(true).open(&marker).unwrap();
    time.set_modified(long_ago).unwrap();
    ensure().unwrap();
    let noted = fs::metadata(&marker).unwrap().modified().unwrap();
    assert!(noted > long_ago + Duration::from_secs(900_000));
    assert_eq!(fs::read(&marker).unwrap(), before);
}
