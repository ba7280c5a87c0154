//! The part of MLflow's REST API 2.0 that an export needs.
//!
//! Knows requests, answers and the limits of a batch; not what is exported.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use super::record::{Point, Record};

/// Most numbers in a request (`MAX_METRICS_PER_BATCH`).
const MAX_METRICS: usize = 1000;
/// Most parameters, and most tags, in a request (`MAX_PARAMS_TAGS_PER_BATCH`).
const MAX_PAIRS: usize = 100;
/// Most bytes in a request: MLflow takes a megabyte.
const MAX_BYTES: usize = 900_000;
/// Runs in an answer to a search.
const PAGE: u32 = 1000;
/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why an export could not go on.
#[derive(Debug, Error)]
pub enum MlflowError {
    /// The address is none of a server.
    #[error("`{uri}` is no address of an MLflow server, such as http://127.0.0.1:5000: {reason}")]
    Address {
        /// As given.
        uri: String,
        /// What is wrong.
        reason: String,
    },
    /// Nobody answers.
    #[error("no MLflow server answers at {uri} ({reason}): start one with `mlflow server`, or correct --uri")]
    NoServer {
        /// The server.
        uri: String,
        /// What happened.
        reason: String,
    },
    /// The server does not want what it was told.
    #[error("MLflow refused {path} with status {status}: {message}")]
    Refused {
        /// What was asked for.
        path: String,
        /// HTTP status.
        status: u16,
        /// MLflow's name of the error, if it gave one.
        code: String,
        /// MLflow's words.
        message: String,
    },
    /// The answer is none of MLflow's.
    #[error("the answer to {path} is not MLflow's: {reason}; is --uri that of an MLflow server?")]
    Answer {
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What a server already holds of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Held {
    /// MLflow's id of the run.
    pub id: String,
    /// Parameters.
    pub params: BTreeMap<String, String>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Newest step of each number.
    pub steps: BTreeMap<String, u64>,
}

/// A server.
pub struct Client {
    uri: String,
    token: Option<String>,
    agent: ureq::Agent,
}

impl Client {
    /// Returns a client of the server at `uri`; `token` is sent along where a server asks who it is.
    ///
    /// # Errors
    /// When `uri` is no address.
    pub fn new(uri: &str, token: Option<String>) -> Result<Self, MlflowError> {
        let wrong = |reason: &str| MlflowError::Address { uri: uri.into(), reason: reason.into() };
        if uri.starts_with("https://") && cfg!(not(feature = "tls")) {
            return Err(wrong("https is not built in: build deepgen with `--features tls`"));
        }
        if !uri.starts_with("http://") && !uri.starts_with("https://") {
            return Err(wrong("it begins with neither http:// nor https://"));
        }
        // Status codes are looked at below: a refusal carries its reason in the body.
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT));
        Ok(Self { uri: uri.trim_end_matches('/').to_owned(), token, agent: config.build().into() })
    }

    /// Returns the server's address.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Returns the id of the experiment `name`, which is made if there is none.
    ///
    /// # Errors
    /// When nobody answers, or the server refuses.
    pub fn experiment(&self, name: &str) -> Result<String, MlflowError> {
        #[derive(Deserialize)]
        struct Found {
            experiment: Experiment,
        }
        #[derive(Deserialize)]
        struct Experiment {
            experiment_id: String,
        }
        let path = "experiments/get-by-name";
        let request = self.agent.get(self.url(path)).query("experiment_name", name);
        let found = self.answer(path, self.with_token(request).call());
        match found {
            Ok(found) => parsed::<Found>(path, found).map(|found| found.experiment.experiment_id),
            Err(MlflowError::Refused { code, .. }) if code == "RESOURCE_DOES_NOT_EXIST" => {
                let path = "experiments/create";
                Ok(parsed::<Experiment>(path, self.post(path, &json!({ "name": name }))?)?.experiment_id)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns what the server holds of the runs whose tag `tag` is `value`, by the value of the tag `by`.
    ///
    /// # Errors
    /// When nobody answers, or the server refuses.
    pub fn runs_tagged(
        &self,
        experiment: &str,
        (tag, value): (&str, &str),
        by: &str,
    ) -> Result<BTreeMap<String, Held>, MlflowError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            runs: Vec<Run>,
            #[serde(default)]
            next_page_token: String,
        }
        let mut all = BTreeMap::new();
        let mut token = String::new();
        loop {
            let path = "runs/search";
            let mut body = json!({
                "experiment_ids": [experiment],
                "filter": format!("tags.`{tag}` = '{}'", value.replace('\'', "")),
                "max_results": PAGE,
            });
            if !token.is_empty() {
                body["page_token"] = token.into();
            }
            let page: Page = parsed(path, self.post(path, &body)?)?;
            for held in page.runs.into_iter().map(Run::held) {
                all.insert(held.tags.get(by).cloned().unwrap_or_default(), held);
            }
            token = page.next_page_token;
            if token.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Makes a run and returns what the server holds of it: nothing but its tags.
    ///
    /// # Errors
    /// When nobody answers, or the server refuses.
    pub fn create(
        &self,
        experiment: &str,
        record: &Record,
        tags: &BTreeMap<String, String>,
    ) -> Result<Held, MlflowError> {
        #[derive(Deserialize)]
        struct Created {
            run: Run,
        }
        let path = "runs/create";
        let body = json!({
            "experiment_id": experiment,
            "run_name": record.name,
            "start_time": record.start_ms,
            "tags": pairs(tags),
        });
        let created: Created = parsed(path, self.post(path, &body)?)?;
        Ok(Held { id: created.run.info.run_id, tags: tags.clone(), ..Held::default() })
    }

    /// Adds to a run, in as many requests as the limits ask for.
    ///
    /// # Errors
    /// When nobody answers, or the server refuses.
    pub fn log(
        &self,
        id: &str,
        params: &BTreeMap<String, String>,
        tags: &BTreeMap<String, String>,
        (points, time_ms): (&[Point], u64),
    ) -> Result<(), MlflowError> {
        let metrics = points
            .iter()
            .map(|point| json!({"key": point.key, "value": point.value, "timestamp": time_ms, "step": point.step}));
        let all = [
            ("params", pairs(params), MAX_PAIRS),
            ("tags", pairs(tags), MAX_PAIRS),
            ("metrics", metrics.collect(), MAX_METRICS),
        ];
        for (what, items, max) in all {
            for batch in batches(items, max) {
                self.post("runs/log-batch", &json!({ "run_id": id, what: batch }))?;
            }
        }
        Ok(())
    }

    /// Says where a run stands.
    ///
    /// # Errors
    /// When nobody answers, or the server refuses.
    pub fn update(&self, id: &str, record: &Record) -> Result<(), MlflowError> {
        let mut body = json!({ "run_id": id, "status": record.status.word() });
        if let Some(end_ms) = record.end_ms {
            body["end_time"] = end_ms.into();
        }
        self.post("runs/update", &body).map(drop)
    }

    fn url(&self, path: &str) -> String {
        format!("{}/api/2.0/mlflow/{path}", self.uri)
    }

    fn with_token<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value, MlflowError> {
        self.answer(path, self.with_token(self.agent.post(self.url(path))).send_json(body))
    }

    fn answer(
        &self,
        path: &str,
        outcome: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value, MlflowError> {
        let nobody = |error: ureq::Error| MlflowError::NoServer { uri: self.uri.clone(), reason: error.to_string() };
        let mut response = outcome.map_err(nobody)?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(nobody)?;
        if status == 200 {
            return parsed(path, text.parse().map_err(|error| answer_error(path, &error))?);
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Refusal {
            error_code: String,
            message: String,
        }
        let Refusal { error_code, message } = serde_json::from_str(&text).unwrap_or_default();
        let message = match message.is_empty() {
            true => text.chars().take(200).collect(),
            false => format!("{error_code}: {message}"),
        };
        Err(MlflowError::Refused { path: path.into(), status, code: error_code, message })
    }
}

fn answer_error(path: &str, error: &serde_json::Error) -> MlflowError {
    MlflowError::Answer { path: path.into(), reason: error.to_string() }
}

fn parsed<T: serde::de::DeserializeOwned>(path: &str, value: Value) -> Result<T, MlflowError> {
    serde_json::from_value(value).map_err(|error| answer_error(path, &error))
}

fn pairs(all: &BTreeMap<String, String>) -> Vec<Value> {
    all.iter().map(|(key, value)| json!({ "key": key, "value": value })).collect()
}

/// Splits items into batches of at most `max`, and of at most [`MAX_BYTES`].
fn batches(items: Vec<Value>, max: usize) -> Vec<Vec<Value>> {
    let mut all: Vec<Vec<Value>> = Vec::new();
    let mut num_bytes = 0;
    for item in items {
        let size = item.to_string().len() + 1;
        match all.last_mut().filter(|batch| batch.len() < max && num_bytes + size <= MAX_BYTES) {
            Some(batch) => {
                num_bytes += size;
                batch.push(item);
            }
            None => {
                num_bytes = size;
                all.push(vec![item]);
            }
        }
    }
    all
}

/// A run as the server tells of it.
#[derive(Deserialize)]
struct Run {
    info: RunInfo,
    #[serde(default)]
    data: RunContent,
}

#[derive(Deserialize)]
struct RunInfo {
    run_id: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RunContent {
    params: Vec<Pair>,
    tags: Vec<Pair>,
    metrics: Vec<Newest>,
}

#[derive(Deserialize)]
struct Pair {
    key: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct Newest {
    key: String,
    #[serde(default)]
    step: u64,
}

impl Run {
    fn held(self) -> Held {
        let map = |pairs: Vec<Pair>| pairs.into_iter().map(|pair| (pair.key, pair.value)).collect();
        Held {
            id: self.info.run_id,
            params: map(self.data.params),
            tags: map(self.data.tags),
            steps: self.data.metrics.into_iter().map(|newest| (newest.key, newest.step)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_to_both_limits() {
        let items = |count: usize, size: usize| vec![Value::from("x".repeat(size)); count];
        let sizes = |items, max| batches(items, max).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(sizes(items(2500, 1), 1000), [1000, 1000, 500]);
        assert_eq!(sizes(items(3, 400_000), 100), [2, 1]);
        assert_eq!(sizes(Vec::new(), 100), [0; 0]);
    }

    #[test]
    fn an_address_that_is_none_is_told() {
        let wrong = |uri: &str| Client::new(uri, None).err().expect("an error").to_string();
        assert!(wrong("127.0.0.1:5000").contains("neither http:// nor https://"));
        assert!(
            Client::new("http://127.0.0.1:5000/", None).is_ok_and(|client| client.uri() == "http://127.0.0.1:5000")
        );
        if cfg!(not(feature = "tls")) {
            assert!(wrong("https://host").contains("--features tls"));
        }
    }
}
