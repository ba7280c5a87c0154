//! Sealed artifacts: `store/<fingerprint>/` with its files and `manifest.json`.
//!
//! A node is done only if its manifest reads and every file it lists is there with its size. Sealing is one rename of
//! a folder whose content is synced, so an artifact is there completely or not at all. Files are made read-only
//! afterwards; folders are not, so that a person can remove them. Knows nothing of runs and plans.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use deepgen_contract::artifact::{FileEntry, MANIFEST_FILE, MANIFEST_VERSION, Manifest};
use deepgen_contract::id::{Fingerprint, NodeName};

use super::accepted;
use super::external::{hash_file, hash_opened};
use super::layout::Layout;
use super::sealed::{SealedMemory, SealedResult};
use crate::plan::{Known, NodeRecord};

/// Name of the memory of manifests in the state folder.
const MEMORY_FILE: &str = "sealed.json";
/// Files of this size are synced one by one.
const LARGE_BYTES: u64 = 1 << 20;

/// An artifact that cannot be sealed or does not verify.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The file system said no.
    #[error("cannot read or write {path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The manifest cannot be read.
    #[error("{path} is no manifest of this program: {what}")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// A listed file is not as it was sealed.
    #[error("{path} {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The output holds something that cannot be kept.
    #[error("{path} is neither a file nor a folder: an artifact holds nothing else")]
    Special {
        /// The thing.
        path: PathBuf,
    },
}

/// All sealed artifacts.
#[derive(Debug)]
pub struct ArtifactStore {
    layout: Layout,
    /// What manifests say that were read before.
    memory: SealedMemory,
    /// What is known of every sealed result; gathered on first use, because only a plan with something to do asks for it.
    results: OnceCell<Vec<(Fingerprint, SealedResult)>>,
    /// The newest of them of each node.
    latest: OnceCell<BTreeMap<NodeName, Fingerprint>>,
    /// What people accepted, by the identity that it stands for; read on first use.
    accepted: OnceCell<BTreeMap<Fingerprint, Fingerprint>>,
}

impl ArtifactStore {
    /// Returns the store of an artifacts folder, which need not exist.
    pub fn open(layout: Layout) -> Self {
        let memory = SealedMemory::open(layout.state().join(MEMORY_FILE));
        let (results, latest, accepted) = (OnceCell::new(), OnceCell::new(), OnceCell::new());
        Self { layout, memory, results, latest, accepted }
    }

    /// Returns where things lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the folder of an artifact.
    pub fn path(&self, fingerprint: &Fingerprint) -> PathBuf {
        self.layout.artifact(fingerprint)
    }

    /// Returns the manifest of a sealed artifact; see [`manifest`].
    ///
    /// # Errors
    /// When there is none or it does not verify.
    pub fn manifest(&self, fingerprint: &Fingerprint) -> Result<Manifest, ArtifactError> {
        manifest(&self.layout, fingerprint)
    }

    /// Reads every file of an artifact and compares its hash: `deepgen check --artifacts`.
    ///
    /// # Errors
    /// Names the first file that differs.
    pub fn verify(&self, fingerprint: &Fingerprint) -> Result<Manifest, ArtifactError> {
        let manifest = self.manifest(fingerprint)?;
        for file in &manifest.files {
            let path = self.path(fingerprint).join(&file.path);
            let hash = hash_file(&path).map_err(|source| ArtifactError::Io { path: path.clone(), source })?;
            if hash != file.blake3 {
                return Err(ArtifactError::Content { path, what: "has another content than was sealed".into() });
            }
        }
        Ok(manifest)
    }

    /// Returns the fingerprints of all folders in the store, sealed or not.
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        let Ok(entries) = fs::read_dir(self.layout.store()) else { return Vec::new() };
        let names = entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok());
        let mut found: Vec<_> = names.filter_map(|name| Fingerprint::parse(&name).ok()).collect();
        found.sort();
        found
    }

    /// Returns what was known of every sealed result when this was first asked; a folder without a readable manifest is none.
    pub fn results(&self) -> &[(Fingerprint, SealedResult)] {
        self.results.get_or_init(|| {
            let known = |fingerprint: Fingerprint| Some((fingerprint, self.result(&fingerprint)?));
            self.fingerprints().into_iter().filter_map(known).collect()
        })
    }

    /// Returns what is known of a sealed result, from memory or from its manifest; its files are not looked at.
    pub fn result(&self, fingerprint: &Fingerprint) -> Option<SealedResult> {
        let folder = self.path(fingerprint);
        self.memory.get(fingerprint, &folder).or_else(|| {
            self.memory.remember(&read_manifest(&folder).ok()?, &folder);
            self.memory.get(fingerprint, &folder)
        })
    }

    /// Takes in what was just sealed, so that the next plan need not read it.
    pub fn remember(&self, manifest: &Manifest) {
        self.memory.remember(manifest, &self.path(&manifest.fingerprint));
    }

    /// Lets go of what only planning asks for.
    pub fn end_planning(&mut self) {
        (self.results, self.latest) = (OnceCell::new(), OnceCell::new());
    }

    /// Writes what was learnt of manifests; a memory that cannot be written costs time and nothing else.
    pub fn save_memory(&self) {
        if let Err(error) = self.memory.save(|fingerprint| self.path(fingerprint).is_dir()) {
            tracing::warn!(%error, "manifests will be read again next time");
        }
    }

    fn latest_results(&self) -> &BTreeMap<NodeName, Fingerprint> {
        self.latest.get_or_init(|| {
            let mut latest: BTreeMap<NodeName, ((bool, u64), Fingerprint)> = BTreeMap::new();
            for (fingerprint, result) in self.results() {
                // A smoke test is compared with only where there is no real result.
                let rank = (!result.is_smoke, result.sealed_ms);
                match latest.get(&result.node) {
                    Some((other, _)) if *other >= rank => {}
                    _ => drop(latest.insert(result.node.clone(), (rank, *fingerprint))),
                }
            }
            latest.into_iter().map(|(node, (_, fingerprint))| (node, fingerprint)).collect()
        })
    }
}

impl Known for ArtifactStore {
    fn is_sealed(&self, fingerprint: &Fingerprint) -> bool {
        if self.memory.verifies(fingerprint, &self.path(fingerprint)) {
            return true;
        }
        match self.manifest(fingerprint) {
            Ok(manifest) => {
                self.remember(&manifest);
                true
            }
            Err(error) => {
                if self.path(fingerprint).exists() {
                    tracing::warn!(fingerprint = fingerprint.short(), %error, "an artifact does not verify");
                }
                false
            }
        }
    }

    fn accepted(&self, fingerprint: &Fingerprint) -> Option<Fingerprint> {
        let accepted = self.accepted.get_or_init(|| {
            let standing = accepted::read_all(&self.layout).into_values().filter(|record| record.revoked.is_none());
            standing.map(|record| (record.to, record.from)).collect()
        });
        accepted.get(fingerprint).copied().filter(|from| self.is_sealed(from))
    }

    fn latest(&self, node: &NodeName) -> Option<NodeRecord> {
        // `sft@variant` of a sweep is compared with `sft` when the variant itself never ran.
        let plain = node.0.rsplit_once('@').map(|(plain, _)| NodeName(plain.to_owned()));
        let latest = self.latest_results();
        let fingerprint = latest.get(node).or_else(|| latest.get(&plain?))?;
        let manifest = read_manifest(&self.path(fingerprint)).ok()?;
        Some(NodeRecord {
            fingerprint: manifest.fingerprint,
            stage_kind: manifest.stage_kind,
            code_version: manifest.code_version,
            seed: manifest.seed,
            settings: manifest.settings.get("settings").cloned().unwrap_or_default(),
            inputs: manifest.inputs.into_iter().collect(),
            content: manifest.content.into_iter().collect(),
        })
    }
}

/// Returns the manifest of a sealed artifact after comparing its files with their recorded sizes.
///
/// # Errors
/// When there is none or it does not verify.
pub fn manifest(layout: &Layout, fingerprint: &Fingerprint) -> Result<Manifest, ArtifactError> {
    let folder = layout.artifact(fingerprint);
    let manifest = read_manifest(&folder)?;
    if manifest.fingerprint != *fingerprint {
        let what = format!("it belongs to {}", manifest.fingerprint.short());
        return Err(ArtifactError::Manifest { path: folder.join(MANIFEST_FILE), what });
    }
    for file in &manifest.files {
        let path = folder.join(&file.path);
        let bytes = fs::metadata(&path).map_err(|source| ArtifactError::Io { path: path.clone(), source })?.len();
        if bytes != file.bytes {
            return Err(ArtifactError::Content { path, what: format!("has {bytes} bytes, not {}", file.bytes) });
        }
    }
    Ok(manifest)
}

fn read_manifest(folder: &Path) -> Result<Manifest, ArtifactError> {
    let path = folder.join(MANIFEST_FILE);
    let text = fs::read(&path).map_err(|source| ArtifactError::Io { path: path.clone(), source })?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| ArtifactError::Manifest { path: path.clone(), what: error.to_string() })?;
    if manifest.version != MANIFEST_VERSION {
        return Err(ArtifactError::Manifest { path, what: format!("version {}", manifest.version) });
    }
    Ok(manifest)
}

/// Turns the output folder of a job into the sealed artifact of `manifest`, whose list of files is filled in here.
///
/// Everything in `out` is hashed, the manifest is written last, and one rename puts it in its place: whoever is killed
/// leaves all of it or nothing. Large files are synced here; many small ones become durable together, when the
/// transition to `Done` does ([`super::recorder`]). A folder that lies there already can only be one that does not verify, and is moved
/// aside.
///
/// # Errors
/// When the output cannot be read or moved; it is left where it was.
pub fn seal(layout: &Layout, out: &Path, mut manifest: Manifest) -> Result<Manifest, ArtifactError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| ArtifactError::Io { path, source }
    };
    // A manifest from a seal that a crash cut short is no part of the result.
    match fs::remove_file(out.join(MANIFEST_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(out)(error)),
        _ => {}
    }
    manifest.files.clear();
    collect(out, "", &mut manifest.files)?;
    manifest.files.sort_by(|a, b| a.path.cmp(&b.path));
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| ArtifactError::Manifest { path: out.join(MANIFEST_FILE), what: error.to_string() })?;
    write_read_only(&out.join(MANIFEST_FILE), &text).map_err(at(out))?;

    let target = layout.artifact(&manifest.fingerprint);
    let store = layout.store();
    let mut moved = fs::rename(out, &target);
    if moved.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        fs::create_dir_all(&store).map_err(at(&store))?;
        moved = fs::rename(out, &target);
    }
    if moved.is_err() && target.exists() {
        let aside = store.join(format!("unverified-{}-{}", manifest.fingerprint.short(), manifest.sealed_ms));
        fs::rename(&target, aside).map_err(at(&target))?;
        moved = fs::rename(out, &target);
    }
    moved.map_err(at(&target))?;
    Ok(manifest)
}

/// Hashes everything under `folder` and makes it read-only.
fn collect(folder: &Path, prefix: &str, files: &mut Vec<FileEntry>) -> Result<(), ArtifactError> {
    let io = |source| ArtifactError::Io { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let path = entry.path();
        let kind = entry.file_type().map_err(io)?;
        let name = entry.file_name().into_string().map_err(|_| ArtifactError::Special { path: path.clone() })?;
        let name = format!("{prefix}{name}");
        if kind.is_dir() {
            collect(&path, &format!("{name}/"), files)?;
        } else if kind.is_file() {
            let entry = (|| {
                let file = File::open(&path)?;
                let bytes = file.metadata()?.len();
                if bytes >= LARGE_BYTES {
                    file.sync_all()?;
                }
                let blake3 = hash_opened(&file, bytes)?;
                file.set_permissions(read_only())?;
                Ok(FileEntry { path: name, bytes, blake3 })
            })();
            files.push(entry.map_err(|source| ArtifactError::Io { path: path.clone(), source })?);
        } else {
            return Err(ArtifactError::Special { path });
        }
    }
    Ok(())
}

fn read_only() -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    fs::Permissions::from_mode(0o444)
}

fn write_read_only(path: &Path, text: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o444).open(path)?.write_all(text)
}
