//! What is kept on disk between runs: journals, the resumable state, sealed artifacts, hashes of external files.
//!
//! Order of every transition: journal (synced), then state (flushed and synced), then act.

pub mod accepted;
pub mod artifacts;
pub mod external;
pub mod garbage;
pub mod glance;
pub mod history;
pub mod index;
pub mod journal;
pub mod layout;
pub mod links;
pub mod lock;
pub mod recorder;
pub mod runs;
pub mod saved;
pub mod sealed;
pub mod state;
pub mod tail;
pub mod verification;

pub use artifacts::ArtifactStore;
pub use external::FileHashes;
pub use layout::Layout;
pub use links::Links;
pub use recorder::Recorder;
