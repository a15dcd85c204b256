//! Running text through the dense model: what it leaves behind for the steps that follow.

pub mod calibrate;
mod covariance;
mod curve;
mod evidence;
pub mod groups;
mod passage;
mod profile;
mod weighing;

pub use calibrate::{Calibration, SoFar, calibrate, calibrate_onwards};
pub use covariance::{Covariance, GramScratch};
pub use curve::{Curve, CurveLevels, CurveOptions, Curves};
pub use evidence::{Evidence, Reread};
pub use groups::Groups;
pub use profile::{FeatureStats, LayerProfile, Profile};

pub(super) use covariance::RIDGE;
pub(super) use passage::{Capture, embed_sequences};
pub(super) use profile::have_covariances;
pub(super) use weighing::Weighing;
