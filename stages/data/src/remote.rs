//! Sources in object stores, by address: `s3://bucket/sets/a/*.tar`, `gs://`, `http(s)://`, `file://`.
//!
//! One file at a time is fetched whole, read by the reader of its format, and removed; its records carry their bytes.
//! Without the feature `cloud` addresses are refused with what to do.

use std::path::Path;

use crate::source::{RecordSource, ScanError};

/// Opens a fetched file.
pub type OpenLocal = Box<dyn Fn(&Path) -> Result<Box<dyn RecordSource>, ScanError> + Send + Sync>;

/// Returns true for addresses, which have a scheme.
pub fn is_address(path: &str) -> bool {
    path.contains("://")
}

/// Refuses an address.
///
/// # Errors
/// Always: this program was built without object stores.
#[cfg(not(feature = "cloud"))]
pub fn open(address: &str, _out_dir: &Path, _local: OpenLocal) -> Result<Box<dyn RecordSource>, ScanError> {
    let reason = "object stores are not built in: build the worker with `--features cloud`, or copy the files here";
    Err(ScanError::Format { path: address.into(), reason })
}

#[cfg(feature = "cloud")]
pub use crate::fetch::open;
