//! `deepgen schema`: the JSON Schema of a kind of file, for editors.

use anyhow::Result;
use deepgen_contract::stage::StageKind;

use crate::cli::{Exit, Wrong};
use crate::spec::{nearest, quoted_list, schema};

/// Arguments of `deepgen schema`.
#[derive(Debug, clap::Args)]
pub struct SchemaArgs {
    #[command(subcommand)]
    pub of: Of,
}

/// Kinds of files.
#[derive(Debug, clap::Subcommand)]
pub enum Of {
    /// Of pipeline files
    Pipeline,
    /// Of experiment files
    Experiment,
    /// Of stage files of a kind, such as train
    Stage {
        /// Kind, as the stage file's first line says it
        kind: String,
    },
}

/// Prints a schema.
///
/// # Errors
/// When there is no such kind of stage.
pub fn schema(args: &SchemaArgs) -> Result<Exit> {
    let schema = match &args.of {
        Of::Pipeline => schema::pipeline(),
        Of::Experiment => schema::experiment(),
        Of::Stage { kind: name } => match StageKind::parse(name) {
            Some(kind) => schema::stage(kind),
            None => {
                let names: Vec<&str> = StageKind::ALL.iter().map(|kind| kind.name()).collect();
                let hint = match nearest(name, &names) {
                    Some(name) => format!("did you mean `{name}`?"),
                    None => format!("kinds are {}", quoted_list(&names)),
                };
                return Err(Wrong(format!("there is no kind of stage `{name}`: {hint}")).into());
            }
        },
    };
    println!("{}", serde_json::to_string_pretty(&schema)?);
    Ok(Exit::Done)
}
