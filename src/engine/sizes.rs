//! Sizes as people write them.

/// Units of sizes, and their bytes, from the largest to the smallest.
pub const UNITS: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1000),
    ("B", 1),
];

/// The bytes of a number with one of the [`UNITS`], for example `80MB`; `None` if it is no such thing, or no size that there is.
pub fn parse_size(text: &str) -> Option<u64> {
    let (name, bytes) = UNITS.iter().find(|(name, _)| text.ends_with(name))?;
    let number = text[..text.len() - name.len()].trim_end();
    let size = number.parse::<f64>().ok()? * *bytes as f64;
    (size.is_finite() && (1.0..1e18).contains(&size)).then_some(size as u64)
}
