//! Sources in object stores, by address: `s3://bucket/sets/a/*.tar`, `gs://`, `http(s)://`, `file://`.
//!
//! One file at a time is fetched whole, read by the reader of its format, and removed; its records carry their bytes.
//! Without the feature `cloud` addresses are refused with what to do. Credentials and endpoints come from the
//! environment, as the stores' own tools read them (`AWS_*`, `GOOGLE_*`).

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
pub use fetch::open;

#[cfg(feature = "cloud")]
mod fetch {
    use std::fs;
    use std::io::Write;
    use std::path::{Path, PathBuf};

    use object_store::path::Path as StorePath;
    use object_store::{ObjectStore, ObjectStoreExt, parse_url_opts};
    use tokio::runtime::{Builder, Runtime};
    use url::Url;

    use super::OpenLocal;
    use crate::sample::SetKind;
    use crate::shard_files::matches;
    use crate::source::{Cause, Fault, Found, Location, RecordSource, ScanError, Visit, read_bytes};

    /// Folder below the output folder that holds the file being read.
    const FETCHED_DIR: &str = "fetched";

    /// Opens the files below `address`, the last part of which may hold `*`; fetched files lie below `out_dir` while
    /// they are read.
    ///
    /// # Errors
    /// When the address makes no sense, the store cannot be listed, or there is nothing of that name.
    pub fn open(address: &str, out_dir: &Path, local: OpenLocal) -> Result<Box<dyn RecordSource>, ScanError> {
        let failed =
            |error: &dyn std::fmt::Display| ScanError::Store { address: address.to_owned(), reason: error.to_string() };
        let url = Url::parse(address).map_err(|error| failed(&error))?;
        // `*` is no part of a path in a store and comes back percent-encoded.
        let last = address.rsplit('/').next().unwrap_or_default();
        let (folder, pattern) = match last.contains('*') {
            true => (address.strip_suffix(last).unwrap_or(address), Some(last)),
            false => (address, None),
        };
        let folder = Url::parse(folder).map_err(|error| failed(&error))?;
        let options = std::env::vars().map(|(key, value)| (key.to_ascii_lowercase(), value));
        let (store, prefix) = parse_url_opts(&folder, options).map_err(|error| failed(&error))?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| failed(&error))?;
        let mut names = match pattern {
            None => vec![prefix],
            Some(pattern) => {
                let listed = runtime.block_on(store.list_with_delimiter(Some(&prefix))).map_err(|e| failed(&e))?;
                let paths = listed.objects.into_iter().map(|object| object.location);
                paths.filter(|path| path.filename().is_some_and(|name| matches(pattern, name))).collect()
            }
        };
        names.sort();
        let first = names.first().ok_or_else(|| ScanError::Nothing { path: address.into(), what: "file" })?;
        let scratch = out_dir.join(FETCHED_DIR);
        // The kind of records is asked for before anything is fetched; a reader of one empty file knows it.
        let io = |source| ScanError::Io { path: scratch.clone(), source };
        fs::create_dir_all(&scratch).map_err(io)?;
        let probe = scratch.join(first.filename().unwrap_or("probe"));
        fs::write(&probe, []).map_err(io)?;
        let opened = local(&probe)?;
        let (kind, has_size_limits) = (opened.kind(), opened.has_size_limits());
        fs::remove_file(&probe).map_err(io)?;
        let address = url.to_string();
        Ok(Box::new(Remote { address, store, names, scratch, runtime, local, kind, has_size_limits }))
    }

    struct Remote {
        address: String,
        store: Box<dyn ObjectStore>,
        names: Vec<StorePath>,
        scratch: PathBuf,
        runtime: Runtime,
        local: OpenLocal,
        kind: SetKind,
        has_size_limits: bool,
    }

    impl Remote {
        /// Fetches an object as it comes, without holding it in memory.
        fn fetch(&self, name: &StorePath, path: &Path) -> Result<(), String> {
            let mut file = fs::File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
            self.runtime.block_on(async {
                let object = self.store.get(name).await.map_err(|error| error.to_string())?;
                let mut chunks = object.into_stream();
                while let Some(chunk) = futures_util::StreamExt::next(&mut chunks).await {
                    let chunk = chunk.map_err(|error| error.to_string())?;
                    file.write_all(&chunk).map_err(|error| format!("{}: {error}", path.display()))?;
                }
                Ok(())
            })
        }
    }

    impl RecordSource for Remote {
        fn kind(&self) -> SetKind {
            self.kind
        }

        fn roots(&self) -> &[PathBuf] {
            &[]
        }

        fn has_size_limits(&self) -> bool {
            self.has_size_limits
        }

        fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
            let mut go_on = true;
            for name in &self.names {
                let path = self.scratch.join(name.filename().unwrap_or("object"));
                if let Err(reason) = self.fetch(name, &path) {
                    let _ = fs::remove_file(&path);
                    let address = format!("{} ({name})", self.address);
                    return Err(ScanError::Store { address, reason });
                }
                let reader = (self.local)(&path)?;
                reader.scan(&mut |found| {
                    go_on = visit(found.and_then(|record| carried(record, reader.roots())));
                    go_on
                })?;
                fs::remove_file(&path).map_err(|source| ScanError::Io { path: path.clone(), source })?;
                if !go_on {
                    break;
                }
            }
            // Not there any more, or not empty: then someone else's files stay.
            let _ = fs::remove_dir(&self.scratch);
            Ok(())
        }
    }

    /// Gives a record the bytes that its fetched file holds.
    fn carried(mut record: crate::source::Record, roots: &[PathBuf]) -> Found {
        let key = record.key.clone();
        for location in record.image.iter_mut().chain(&mut record.references) {
            if location.held.is_none() {
                if location.span.is_none() {
                    let reason = format!("`{}` is a file of its own, which is not fetched", location.path);
                    return Err(Fault::new(Cause::Missing, reason).of(key));
                }
                let bytes = read_bytes(roots, location, &key).map_err(|error| Fault::from(&error).of(&*key))?;
                *location = Location::held(0, location.path.clone(), bytes.into_owned());
            }
        }
        Ok(record)
    }
}
