//! What is remembered of sealed results, so that a plan over ten thousand of them reads none of their manifests.
//!
//! A manifest counts as unchanged when its size, modification time and inode are; what it says of its files is then
//! taken from here and compared with the files themselves. Only a memory: without it, or for a result that it does not
//! know, manifests are read. Knows manifests as they were sealed, not plans or runs.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use deepgen_contract::artifact::{MANIFEST_FILE, Manifest};
use deepgen_contract::id::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};

use super::external::{Stamp, write_memory};

const SEALED_VERSION: u32 = 1;

/// A sealed result, as far as planning asks without knowing which one it will need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SealedResult {
    /// Node that made it first.
    pub node: NodeName,
    /// Name of its stage file.
    pub stage: String,
    /// True when it, or something that it is made from, was cut to a few steps.
    pub is_smoke: bool,
    /// Time of sealing, milliseconds since 1970.
    pub sealed_ms: u64,
    /// Seconds that its attempts ran, all together.
    pub run_seconds: f64,
    /// The manifest that says so.
    manifest: Stamp,
    /// Every file but the manifest, with its size in bytes.
    files: Box<[(Box<str>, u64)]>,
}

impl SealedResult {
    /// Returns what is remembered of the result in `folder`.
    ///
    /// # Errors
    /// When its manifest has gone.
    fn of(manifest: &Manifest, folder: &Path) -> io::Result<Self> {
        Ok(Self {
            node: manifest.node.clone(),
            stage: manifest.stage.clone(),
            is_smoke: manifest.is_smoke,
            sealed_ms: manifest.sealed_ms,
            run_seconds: manifest.run_seconds,
            manifest: Stamp::of(&fs::metadata(folder.join(MANIFEST_FILE))?),
            files: manifest.files.iter().map(|file| (file.path.as_str().into(), file.bytes)).collect(),
        })
    }

    fn has_same_manifest(&self, folder: &Path) -> bool {
        fs::metadata(folder.join(MANIFEST_FILE)).is_ok_and(|found| Stamp::of(&found) == self.manifest)
    }

    fn has_its_files(&self, folder: &Path) -> bool {
        self.files.iter().all(|(path, bytes)| fs::metadata(folder.join(&**path)).is_ok_and(|file| file.len() == *bytes))
    }
}

/// The memory of an artifacts folder, read when it is first asked.
#[derive(Debug)]
pub struct SealedMemory {
    file: PathBuf,
    known: OnceCell<RefCell<Known>>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    version: u32,
    results: BTreeMap<Fingerprint, SealedResult>,
    #[serde(skip)]
    is_changed: bool,
}

impl SealedMemory {
    /// Returns the memory kept in `file`; a damaged one is forgotten.
    pub fn open(file: PathBuf) -> Self {
        Self { file, known: OnceCell::new() }
    }

    /// Returns true when the result in `folder` is remembered, unchanged and has all its files.
    pub fn verifies(&self, fingerprint: &Fingerprint, folder: &Path) -> bool {
        let known = self.known().borrow();
        known
            .results
            .get(fingerprint)
            .is_some_and(|known| known.has_same_manifest(folder) && known.has_its_files(folder))
    }

    /// Returns what is remembered of the result in `folder`, if its manifest is unchanged.
    pub fn get(&self, fingerprint: &Fingerprint, folder: &Path) -> Option<SealedResult> {
        self.known().borrow().results.get(fingerprint).filter(|known| known.has_same_manifest(folder)).cloned()
    }

    /// Takes in what the manifest of the result in `folder` says.
    pub fn remember(&self, manifest: &Manifest, folder: &Path) {
        let Ok(result) = SealedResult::of(manifest, folder) else { return };
        let mut known = self.known().borrow_mut();
        known.results.insert(manifest.fingerprint, result);
        known.is_changed = true;
    }

    /// Writes what was learnt, without results that have gone; without this the next plan reads manifests again.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, is_there: impl Fn(&Fingerprint) -> bool) -> io::Result<()> {
        let Some(known) = self.known.get() else { return Ok(()) };
        let mut known = known.borrow_mut();
        if !known.is_changed {
            return Ok(());
        }
        known.version = SEALED_VERSION;
        known.results.retain(|fingerprint, _| is_there(fingerprint));
        write_memory(&self.file, |file| Ok(serde_json::to_writer(file, &*known)?))?;
        known.is_changed = false;
        Ok(())
    }

    fn known(&self) -> &RefCell<Known> {
        self.known.get_or_init(|| {
            let text = fs::read(&self.file).ok();
            let known = text.and_then(|text| serde_json::from_slice::<Known>(&text).ok());
            RefCell::new(known.filter(|known| known.version == SEALED_VERSION).unwrap_or_default())
        })
    }
}
