//! The cache folder: within a number of bytes, with what was used last longest ago going first; shown and cleared.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use crate::common::engine::{CACHE, Workshop, by, flap, tokens};
use crate::common::program::{run_with_input, stderr, stdout, succeeded};
use flapjack::engine::{
    CacheContent, CacheFolder, CacheKind, Cleared, Engine, Notice, OpenOptions, ProfileFrom,
    PruneOptions, Target, ignore,
};
use flapjack::hub;
use flapjack::prune::{Method, outcome, store};
use serde_json::Value;

fn open_within(workshop: &Workshop, limit: u64) -> Engine {
    let options = OpenOptions {
        threads: Some(1),
        cache: Some(workshop.path(CACHE)),
        cache_size: Some(limit),
        ..OpenOptions::default()
    };
    Engine::open(&workshop.model, options).unwrap()
}

/// A file as the cache names them, of so many bytes and last used so many hours ago.
fn plant(workshop: &Workshop, n: u32, ending: &str, bytes: u64, hours: u64) -> PathBuf {
    let name = format!("{CACHE}/{n:032x}-{n:032x}-0123456789abcdef-v{ending}");
    let path = workshop.write(&name, "");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(bytes).unwrap();
    let time = SystemTime::now() - Duration::from_secs(hours * 3600);
    file.set_modified(time).unwrap();
    path
}

fn profile() -> String {
    format!("{}.profile", store::VERSION)
}

fn cache(workshop: &Workshop, limit: u64) -> CacheFolder {
    CacheFolder::new(Some(workshop.path(CACHE)), Some(limit)).unwrap()
}

fn on_disk(workshop: &Workshop) -> u64 {
    let entries = cache(workshop, 0).entries().unwrap();
    entries.iter().map(|e| e.bytes.next_multiple_of(4096)).sum()
}

// ---- the limit ----

#[test]
fn the_cache_stays_within_its_limit_and_what_was_used_last_longest_ago_goes_first() {
    let workshop = Workshop::new();
    let mib = 1 << 20;
    let files: Vec<_> = (0..100)
        .map(|n| plant(&workshop, n, &profile(), mib, 100 - u64::from(n)))
        .collect();
    // Others are nobody's business.
    let foreign = workshop.write("profiles/mine.profile", vec![0; 3 << 20]);
    open_within(&workshop, 200 * mib)
        .prune(&flap(), &mut ignore)
        .unwrap();
    assert!(
        files.iter().all(|file| file.exists()),
        "there is room for all"
    );

    let other = PruneOptions {
        target: Target::Ratio(0.2),
        ..flap()
    };
    open_within(&workshop, 10 * mib)
        .prune(&other, &mut ignore)
        .unwrap();
    assert!(on_disk(&workshop) <= 10 * mib, "{}", on_disk(&workshop));
    let stay: Vec<bool> = files.iter().map(|file| file.exists()).collect();
    let first = stay.iter().position(|stays| *stays).unwrap();
    assert!((90..=95).contains(&first), "{first}");
    assert!(stay[first..].iter().all(|stays| *stays));
    assert!(foreign.exists());
    // What the run itself has left is the youngest.
    assert!(
        open_within(&workshop, 10 * mib)
            .prune(&other, &mut ignore)
            .unwrap()
            .repeated
    );
}

#[test]
fn files_of_earlier_formats_go_before_all_others() {
    let workshop = Workshop::new();
    let mib = 1 << 20;
    let old = plant(&workshop, 1, &profile(), mib, 1000);
    let (profiles, outcomes) = (store::VERSION - 1, outcome::VERSION - 1);
    let earlier = [
        plant(&workshop, 2, &format!("{profiles}.profile"), mib, 1),
        plant(&workshop, 3, &format!("{outcomes}.outcome"), mib, 1),
    ];
    // One of a later version may be of use to whoever has that.
    let later = plant(&workshop, 4, "1000.profile", mib, 999);
    let entries = cache(&workshop, 0).entries().unwrap();
    let outdated: Vec<bool> = entries.iter().map(|entry| entry.outdated).collect();
    assert_eq!(outdated, [false, false, true, true]);
    open_within(&workshop, 3 * mib)
        .prune(&flap(), &mut ignore)
        .unwrap();
    assert_eq!(earlier.each_ref().map(|file| file.exists()), [false, false]);
    assert!(old.exists() && later.exists());
}

#[test]
fn using_a_file_keeps_it() {
    let workshop = Workshop::new();
    workshop.prune(&flap());
    let used = || -> Vec<SystemTime> {
        let entries = cache(&workshop, 0).entries().unwrap();
        entries.iter().map(|entry| entry.last_used).collect()
    };
    let long_ago = SystemTime::now() - Duration::from_secs(1_000_000);
    let age = || {
        for entry in cache(&workshop, 0).entries().unwrap() {
            let file = File::options().write(true).open(&entry.path).unwrap();
            file.set_modified(long_ago).unwrap();
        }
    };
    age();
    assert!(workshop.prune(&flap()).repeated);
    // The outcome, and the profile that it is found by.
    assert_eq!(used().len(), 2);
    assert!(
        used()
            .iter()
            .all(|time| *time > long_ago + Duration::from_secs(1000))
    );
    // The profile alone, where another ratio is asked for.
    age();
    let other = PruneOptions {
        target: Target::Ratio(0.2),
        ..flap()
    };
    let report = workshop.prune(&other);
    assert_eq!(report.calibration.profile, ProfileFrom::File);
    let young = used()
        .iter()
        .filter(|time| **time > long_ago + Duration::from_secs(1000))
        .count();
    assert_eq!((used().len(), young), (3, 2));
}

#[test]
fn what_is_larger_than_the_limit_is_not_kept_which_is_said_and_outcomes_are_found_without_it() {
    let workshop = Workshop::new();
    let options = by(Method::Best);
    let open = |limit| open_within(&workshop, limit);
    let whole = open(1 << 30).prune(&options, &mut ignore).unwrap();
    assert!(whole.notices.is_empty(), "{:?}", whole.notices);
    let sizes = |kind: &str| fs::metadata(&workshop.cached(kind)[0]).unwrap().len();
    let (profile, outcome) = (sizes("profile"), sizes("outcome"));
    assert!(profile > 2 * outcome, "{profile} and {outcome}");
    cache(&workshop, 0).clear(None).unwrap();

    let limit = profile - 4096;
    let report = open(limit).prune(&options, &mut ignore).unwrap();
    match &report.notices[..] {
        [
            Notice::TooLargeToKeep {
                kind: CacheKind::Profile,
                bytes,
                limit: told,
            },
        ] => {
            assert!(*bytes > *told && *told == limit && *bytes <= profile);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(report.calibration.hash, whole.calibration.hash);
    assert_eq!(
        (
            workshop.cached("profile").len(),
            workshop.cached("hash").len()
        ),
        (0, 1)
    );
    let again = open(limit).prune(&options, &mut ignore).unwrap();
    assert!(again.repeated && again.calibration.profile == ProfileFrom::Unread);
    assert!(again.notices.is_empty());

    // Nothing at all is kept, and nothing said, where nothing is to be kept.
    cache(&workshop, 0).clear(None).unwrap();
    let report = open(0).prune(&options, &mut ignore).unwrap();
    assert!(report.notices.is_empty() && cache(&workshop, 0).entries().unwrap().is_empty());
}

#[test]
fn outcomes_are_found_after_their_profile_had_to_go() {
    let workshop = Workshop::new();
    let options = by(Method::Best);
    workshop.prune(&options);
    let profile = workshop.cached("profile").remove(0);
    let size = fs::metadata(&profile).unwrap().len();
    // The profile was used last before its outcome, and is too large for what comes now.
    let file = File::options().write(true).open(&profile).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(100))
        .unwrap();
    let mut engine = open_within(&workshop, size);
    engine
        .prune(
            &PruneOptions {
                target: Target::Ratio(0.2),
                ..flap()
            },
            &mut ignore,
        )
        .unwrap();
    assert!(!profile.exists() && profile.with_extension("hash").exists());
    assert!(
        open_within(&workshop, size)
            .prune(&options, &mut ignore)
            .unwrap()
            .repeated
    );
    assert!(on_disk(&workshop) <= size);
}

#[test]
fn processes_that_evict_at_the_same_time_do_not_disturb_each_other() {
    let workshop = Workshop::new();
    workshop.prune(&flap());
    let limit = 2 * on_disk(&workshop);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let workshop = &workshop;
            scope.spawn(move || {
                for round in 0..6 {
                    let options = PruneOptions {
                        target: Target::Ratio(0.1 + 0.1 * f64::from((thread + round) % 5)),
                        calibration: tokens(400 + 16 * round as usize),
                        ..flap()
                    };
                    let report = open_within(workshop, limit)
                        .prune(&options, &mut ignore)
                        .unwrap();
                    assert!(report.notices.is_empty(), "{:?}", report.notices);
                }
            });
        }
    });
    open_within(&workshop, limit)
        .prune(&flap(), &mut ignore)
        .unwrap();
    assert!(on_disk(&workshop) <= limit);
    let hidden = fs::read_dir(workshop.path(CACHE)).unwrap();
    let names = hidden.map(|file| file.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with('.')).count(), 0);
}

// ---- showing and clearing ----

#[test]
fn entries_tell_what_they_hold() {
    let workshop = Workshop::new();
    workshop.prune(&flap());
    let entries = cache(&workshop, 0).entries().unwrap();
    assert_eq!(entries.len(), 2);
    for entry in entries {
        assert_eq!(entry.bytes, fs::metadata(&entry.path).unwrap().len());
        match entry.content().unwrap() {
            CacheContent::Profile(origin) => {
                assert_eq!(entry.kind, CacheKind::Profile);
                assert_eq!(
                    (origin.model_name.as_str(), origin.tokens),
                    ("tiny.gguf", 512)
                );
            }
            CacheContent::Text { .. } => panic!("the built-in text need not be written"),
            CacheContent::Outcome {
                model,
                target,
                ratio,
                ..
            } => {
                assert_eq!(entry.kind, CacheKind::Outcome);
                assert_eq!(
                    (model.as_str(), target, ratio),
                    ("tiny.gguf", Target::Ratio(0.3), 0.3)
                );
            }
        }
    }
    // What is no profile inside is shown all the same.
    let path = plant(&workshop, 1, &profile(), 100, 1);
    let entries = cache(&workshop, 0).entries().unwrap();
    let odd = entries.iter().find(|entry| entry.path == path).unwrap();
    assert_eq!((odd.content(), odd.bytes), (None, 100));
    let none = CacheFolder::new(Some(workshop.path("nowhere")), Some(0)).unwrap();
    assert!(none.entries().unwrap().is_empty());
    assert_eq!(none.clear(None).unwrap(), Cleared::default());
}

#[test]
fn clearing_takes_all_or_what_was_not_used_for_long() {
    let workshop = Workshop::new();
    let old = plant(&workshop, 1, &profile(), 5000, 48);
    let young = plant(&workshop, 2, &profile(), 700, 1);
    let foreign = workshop.write("profiles/mine.profile", "");
    let day = Duration::from_secs(24 * 3600);
    let cleared = |age| cache(&workshop, 0).clear(age).unwrap();
    assert_eq!(cleared(Some(3 * day)), Cleared::default());
    assert_eq!(
        cleared(Some(day)),
        Cleared {
            files: 1,
            bytes: 5000
        }
    );
    assert!(!old.exists() && young.exists());
    assert_eq!(
        cleared(None),
        Cleared {
            files: 1,
            bytes: 700
        }
    );
    assert!(!young.exists() && foreign.exists());
}

/// The program with the cache folder of a workshop, in which profiles are in a folder of their own.
fn flapjack(folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flapjack"));
    command.args(arguments).env("FLAPJACK_CACHE", folder);
    command.envs(environment.iter().copied());
    run_with_input(command, b"")
}

#[test]
fn the_program_lists_and_clears_the_cache() {
    let workshop = Workshop::new();
    let folder = workshop.path("");
    let program = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        succeeded(&flapjack(&folder, &arguments, &[])).0
    };
    assert!(program("cache").contains("together     0.00 MB"));
    workshop.prune(&flap());
    plant(
        &workshop,
        1,
        &format!("{}.outcome", outcome::VERSION - 1),
        3_000_000,
        50,
    );
    let model = workshop.write(hub::DEFAULT_MODEL.file_name, vec![0; 2_000_000]);
    workshop.write(&format!("{}.verified", hub::DEFAULT_MODEL.file_name), "");

    let text = program("cache");
    for expected in [
        workshop.path(CACHE).to_str().unwrap(),
        "tiny.gguf on 512 tokens of the built-in text",
        "tiny.gguf with --prune 0.3",
        "just now",
        "3.00 MB  2 days ago       of an earlier version, not used any more",
        "of at most 2000.00 MB (FLAPJACK_CACHE_SIZE",
        "2.00 MB  SmolLM2",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let limited = flapjack(&folder, &["cache"], &[("FLAPJACK_CACHE_SIZE", "30MB")]);
    assert!(succeeded(&limited).0.contains("of at most 30.00 MB"));

    let json: Value = serde_json::from_str(&program("cache --json")).unwrap();
    assert_eq!(json["limit"], 2_000_000_000u64);
    assert_eq!(json["entries"].as_array().unwrap().len(), 3);
    let entry = json["entries"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&entry["kind"], &entry["bytes"]),
        (&"outcome".into(), &3_000_000.into())
    );
    assert_eq!(entry["outdated"], true);
    assert_eq!(json["models"][0]["bytes"], 2_000_000);

    let text = program("cache clear --older-than 1d");
    assert!(
        text.contains("removed 1 file of earlier runs, 3.00 MB"),
        "{text}"
    );
    let text = program("cache clear");
    assert!(
        text.contains("removed 2 files") && text.contains("--models"),
        "{text}"
    );
    assert!(model.exists() && workshop.cached("profile").is_empty());
    let text = program("cache clear --models");
    assert!(
        text.contains("removed 0 files") && text.contains("removed the default model"),
        "{text}"
    );
    assert!(!model.exists() && !model.with_extension("gguf.verified").exists());
    assert!(workshop.model.exists());
}

#[test]
fn the_limit_is_set_in_the_environment_and_a_wrong_one_is_named() {
    let workshop = Workshop::new();
    let folder = workshop.path("");
    let model = workshop.model.to_str().unwrap();
    let run = "run --method flap --calib-tokens 512 --prune 0.3 -n 2 -p a -m";
    let run: Vec<&str> = run.split(' ').chain([model]).collect();
    let with = |limit| flapjack(&folder, &run, &[("FLAPJACK_CACHE_SIZE", limit)]);
    let (_, log) = succeeded(&with("1kB"));
    assert!(
        log.contains("FLAPJACK_CACHE_SIZE sets another limit"),
        "{log}"
    );
    assert_eq!(workshop.cached("profile").len(), 0);
    let (_, log) = succeeded(&with("0"));
    assert!(!log.contains("not kept"), "{log}");
    assert_eq!(workshop.cached("profile").len(), 0);
    succeeded(&with("1GB"));
    assert_eq!(workshop.cached("profile").len(), 1);
    for command in [&run[..], &["cache"]] {
        let output = flapjack(&folder, command, &[("FLAPJACK_CACHE_SIZE", "lots")]);
        assert_eq!(
            (output.status.code(), stdout(&output).as_str()),
            (Some(1), "")
        );
        let message = stderr(&output);
        assert!(
            message.contains("FLAPJACK_CACHE_SIZE is \"lots\""),
            "{message}"
        );
    }
}
