//! A calibration under way: what it has collected is kept now and then, and when it is called off, so that the next run goes on from there.

use std::time::{Duration, Instant};

use super::Engine;
use super::cache::CacheFolder;
use crate::prune::store::Content;
use crate::prune::{Curves, LayerProfile, Origin, Profile};

/// How far apart it is kept, and further where that takes long: at most a share of the time.
const BETWEEN: Duration = Duration::from_secs(10);
const LEAST_SHARE: u32 = 20;
/// Less work than this is not worth keeping.
const LEAST_WORK: Duration = Duration::from_secs(1);

/// Where a calibration keeps what it has collected so far.
#[derive(Debug)]
pub(super) struct Partial {
    /// `None` where nothing is kept.
    cache: Option<CacheFolder>,
    origin: Origin,
    /// When it was last kept, or began.
    kept: Instant,
    /// How long that took.
    keeping: Duration,
}

impl Partial {
    /// That of a profile, and what an earlier run has collected of it: statistics of the first sequences of the text, or of all of it and the
    /// loss curves of the first modules.
    pub fn begin(engine: &Engine, origin: &Origin, cached: bool) -> (Self, Option<Profile>) {
        let cache = cached.then(|| engine.cache.clone());
        let begun = cache.as_ref().and_then(|cache| cache.find_partial(origin));
        let begun = begun.filter(|profile| profile.check_shape(&engine.model).is_ok());
        let partial = Self {
            cache,
            origin: origin.clone(),
            kept: Instant::now(),
            keeping: Duration::ZERO,
        };
        (partial, begun)
    }

    /// Keeps what is collected so far, if it is time for that, or if the work `ends` there.
    pub fn keep(&mut self, layers: &[LayerProfile], curves: Option<&Curves>, ends: bool) {
        let Some(cache) = &self.cache else { return };
        let least = match ends {
            true => LEAST_WORK,
            false => BETWEEN.max(self.keeping * LEAST_SHARE),
        };
        if self.kept.elapsed() < least {
            return;
        }
        let start = Instant::now();
        cache.keep_partial(Content {
            origin: &self.origin,
            layers,
            curves,
        });
        (self.kept, self.keeping) = (Instant::now(), start.elapsed());
    }

    /// Removes what was kept: the profile is whole.
    pub fn remove(self) {
        if let Some(cache) = &self.cache {
            cache.remove_partial(&self.origin);
        }
    }
}
