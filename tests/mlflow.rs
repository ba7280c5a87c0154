//! `deepgen export-mlflow` against a small server that keeps to MLflow's limits and tells what it was sent.

mod harness;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use deepgen::mlflow::client::Client;
use deepgen::mlflow::export::export;
use deepgen::mlflow::record::{NODE_TAG, Point, RUN_TAG, Record, Status};
use harness::Project;
use serde_json::{Value, json};

/// A run as the server holds it.
#[derive(Debug, Clone, Default)]
struct Run {
    experiment: String,
    params: BTreeMap<String, String>,
    tags: BTreeMap<String, String>,
    /// Key, step and value, in the order in which they came.
    metrics: Vec<(String, u64, f64)>,
    status: String,
    end_time: Option<u64>,
}

#[derive(Debug, Default)]
struct Books {
    experiments: Vec<String>,
    runs: Vec<Run>,
    num_batches: usize,
}

/// An MLflow server with one experiment store in memory.
struct Server {
    uri: String,
    books: Arc<Mutex<Books>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let books = Arc::new(Mutex::new(Books::default()));
        let shared = Arc::clone(&books);
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let _ = serve(&connection.unwrap(), &shared);
            }
        });
        Self { uri, books }
    }

    fn runs(&self) -> Vec<Run> {
        self.books.lock().unwrap().runs.clone()
    }

    /// Returns the run of a node; the run itself has an empty name.
    fn run(&self, node: &str) -> Run {
        let runs = self.runs();
        runs.into_iter().find(|run| run.tags[NODE_TAG] == node).unwrap_or_else(|| panic!("no run of `{node}`"))
    }
}

fn serve(mut connection: &TcpStream, books: &Mutex<Books>) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((key, value)) = header.split_once(':') else { break };
        if key.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let path = path.strip_prefix("/api/2.0/mlflow/").unwrap_or(path);
    let body = if body.len() > 1_000_000 {
        Err(("INVALID_PARAMETER_VALUE", "the request is larger than a megabyte".to_owned()))
    } else {
        Ok(serde_json::from_slice(&body).unwrap_or(Value::Null))
    };
    let answer = body.and_then(|body| books.lock().unwrap().answer(path, query, &body));
    let (status, text) = match answer {
        Ok(value) => ("200 OK", value.to_string()),
        Err((code, message)) => {
            let status = if code == "RESOURCE_DOES_NOT_EXIST" { "404 Not Found" } else { "400 Bad Request" };
            (status, json!({"error_code": code, "message": message}).to_string())
        }
    };
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", text.len());
    connection.write_all(head.as_bytes())?;
    connection.write_all(text.as_bytes())
}

fn number(value: &Value) -> usize {
    value.as_str().and_then(|id| id.parse().ok()).unwrap_or(usize::MAX)
}

fn pairs(value: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    value.as_array().into_iter().flatten().map(|pair| (text(&pair["key"]), text(&pair["value"]))).collect()
}

impl Books {
    fn answer(&mut self, path: &str, query: &str, body: &Value) -> Result<Value, (&'static str, String)> {
        let wrong = |message: &str| Err(("INVALID_PARAMETER_VALUE", message.to_owned()));
        match path {
            "experiments/get-by-name" => {
                let name = query.strip_prefix("experiment_name=").unwrap().replace("%20", " ").replace('+', " ");
                match self.experiments.iter().position(|known| *known == name) {
                    Some(at) => Ok(json!({"experiment": {"experiment_id": at.to_string(), "name": name}})),
                    None => Err(("RESOURCE_DOES_NOT_EXIST", format!("No Experiment with id={name} exists"))),
                }
            }
            "experiments/create" => {
                self.experiments.push(body["name"].as_str().unwrap().to_owned());
                Ok(json!({"experiment_id": (self.experiments.len() - 1).to_string()}))
            }
            "runs/create" => {
                assert!(body["start_time"].as_u64().unwrap() > 0);
                let tags = pairs(&body["tags"]).into_iter().collect();
                let experiment = body["experiment_id"].as_str().unwrap().to_owned();
                self.runs.push(Run { experiment, tags, status: "RUNNING".into(), ..Run::default() });
                Ok(json!({"run": {"info": {"run_id": (self.runs.len() - 1).to_string()}, "data": {}}}))
            }
            "runs/search" => {
                let filter = body["filter"].as_str().unwrap();
                let value = filter.strip_prefix("tags.`deepgen.run` = '").unwrap().trim_end_matches('\'');
                let is_meant =
                    |run: &Run| body["experiment_ids"] == json!([run.experiment]) && run.tags[RUN_TAG] == value;
                let found = self.runs.iter().enumerate().filter(|(_, run)| is_meant(run));
                // Two to a page, to be asked for more.
                let first = body["page_token"].as_str().map_or(0, |token| token.parse().unwrap());
                let page: Vec<Value> = found.clone().skip(first).take(2).map(|(id, run)| run.told(id)).collect();
                let token = if found.count() > first + 2 { (first + 2).to_string() } else { String::new() };
                Ok(json!({"runs": page, "next_page_token": token}))
            }
            "runs/log-batch" => {
                self.num_batches += 1;
                let (params, tags) = (pairs(&body["params"]), pairs(&body["tags"]));
                let metrics = body["metrics"].as_array().cloned().unwrap_or_default();
                if params.len() > 100 || tags.len() > 100 || metrics.len() > 1000 {
                    return wrong("too many in a batch");
                }
                let Some(run) = self.runs.get_mut(number(&body["run_id"])) else { return wrong("no such run") };
                for (key, value) in params {
                    if value.len() > 6000 || key.len() > 250 {
                        return wrong("a parameter is too long");
                    }
                    if run.params.insert(key.clone(), value.clone()).is_some_and(|before| before != value) {
                        return wrong(&format!("Changing param values is not allowed. Param with key='{key}'"));
                    }
                }
                run.tags.extend(tags);
                for metric in metrics {
                    let key = metric["key"].as_str().unwrap().to_owned();
                    assert!(metric["timestamp"].is_u64());
                    run.metrics.push((key, metric["step"].as_u64().unwrap(), metric["value"].as_f64().unwrap()));
                }
                Ok(json!({}))
            }
            "runs/update" => {
                let Some(run) = self.runs.get_mut(number(&body["run_id"])) else { return wrong("no such run") };
                run.status = body["status"].as_str().unwrap().to_owned();
                run.end_time = body["end_time"].as_u64();
                Ok(json!({}))
            }
            other => Err(("ENDPOINT_NOT_FOUND", other.to_owned())),
        }
    }
}

impl Run {
    /// Returns the run as an answer to a search has it: of each number the newest.
    fn told(&self, id: usize) -> Value {
        let pairs = |all: &BTreeMap<String, String>| -> Vec<Value> {
            all.iter().map(|(key, value)| json!({"key": key, "value": value})).collect()
        };
        let mut newest = BTreeMap::new();
        for (key, step, value) in &self.metrics {
            let entry = newest.entry(key).or_insert((*step, *value));
            if entry.0 <= *step {
                *entry = (*step, *value);
            }
        }
        let metrics: Vec<Value> =
            newest.iter().map(|(key, (step, value))| json!({"key": key, "step": step, "value": value})).collect();
        json!({
            "info": {"run_id": id.to_string(), "status": self.status},
            "data": {"params": pairs(&self.params), "tags": pairs(&self.tags), "metrics": metrics},
        })
    }
}

#[test]
fn a_run_becomes_a_run_with_its_nodes_below_it_once() {
    let (project, server) = (Project::new(), Server::start());
    project.run().expect(0);
    let told = project.deepgen(&["export-mlflow", "--uri", &server.uri]).expect(0);
    assert!(told.stdout.contains("7 runs made, 0 runs gone on with"), "{}", told.stdout);
    assert_eq!(server.books.lock().unwrap().experiments, ["small"]);
    let (whole, sft) = (server.run(""), server.run("sft"));
    assert_eq!((whole.status.as_str(), whole.tags["deepgen.pipeline"].as_str()), ("FINISHED", "small"));
    assert_eq!((sft.status.as_str(), sft.tags["mlflow.parentRunId"].as_str()), ("FINISHED", "0"));
    assert!(sft.end_time.is_some() && sft.params["optimizer.lr"] == "0.00005", "{:?}", sft.params);
    let folder = project.path("artifacts/store").join(&sft.tags["deepgen.fingerprint"]);
    assert_eq!(sft.tags["deepgen.result"], folder.canonicalize().unwrap().display().to_string());
    // The numbers of the result, each once, with the steps of its lines.
    let lines = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!lines.is_empty());
    for line in &lines {
        for (key, value) in line.as_object().unwrap().iter().filter(|(key, _)| *key != "step") {
            let wanted = (key.clone(), line["step"].as_u64().unwrap(), value.as_f64().unwrap());
            assert_eq!(sft.metrics.iter().filter(|metric| **metric == wanted).count(), 1, "{wanted:?}");
        }
    }

    let before = server.runs();
    let again = project.deepgen(&["export-mlflow", "--uri", &server.uri]).expect(0);
    assert!(again.stdout.contains("0 runs made, 7 runs gone on with, 0 numbers sent"), "{}", again.stdout);
    let after = server.runs();
    assert!(before.iter().zip(&after).all(|(a, b)| a.metrics == b.metrics && a.params == b.params && a.tags == b.tags));
    assert_eq!(before.len(), after.len());
    project.deepgen(&["export-mlflow", "--uri", &server.uri, "--experiment", "my own"]).expect(0);
    assert_eq!(server.books.lock().unwrap().experiments, ["small", "my own"]);
    assert_eq!(server.runs().len(), 14);
}

#[test]
fn nobody_at_the_address_is_told_and_what_to_do() {
    let project = Project::new();
    project.run().expect(0);
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let uri = format!("http://{address}");
    project.deepgen(&["export-mlflow", "--uri", &uri]).expect(1).says(&format!("no MLflow server answers at {uri}"));
    project.deepgen(&["export-mlflow", "--uri", &uri]).says("mlflow server");
    project.deepgen(&["export-mlflow", "--uri", "127.0.0.1:5000"]).expect(2).says("neither http:// nor https://");
    project.deepgen(&["export-mlflow", "nope", "--uri", &uri]).expect(2).says("no run `nope`");
}

fn record(num_steps: u64) -> Record {
    let map = |count: usize, size: usize| -> BTreeMap<String, String> {
        (0..count).map(|i| (format!("key{i:04}"), "v".repeat(size))).collect()
    };
    let mut tags = map(150, 10);
    tags.extend([(RUN_TAG.to_owned(), "r".to_owned()), (NODE_TAG.to_owned(), String::new())]);
    let point = |step| ["loss", "lr"].map(|key| Point { key: key.into(), value: step as f64, step });
    Record {
        node: String::new(),
        name: "r".into(),
        status: Status::Running,
        start_ms: 1,
        end_ms: None,
        params: map(250, 6000),
        tags,
        points: (0..num_steps).flat_map(point).collect(),
    }
}

#[test]
fn what_is_beyond_the_limits_of_a_batch_is_split_and_a_longer_run_is_gone_on_with() {
    let server = Server::start();
    let client = Client::new(&server.uri, None).unwrap();
    let told = export(&client, "e", "r", &[record(1250)]).unwrap();
    assert_eq!((told.num_created, told.num_points), (1, 2500));
    let run = server.run("");
    assert_eq!((run.params.len(), run.metrics.len()), (250, 2500));
    assert!(run.tags.len() >= 152);
    // Three of parameters and three of numbers; the tags came with the run.
    assert_eq!(server.books.lock().unwrap().num_batches, 6);
    let told = export(&client, "e", "r", &[record(1300)]).unwrap();
    assert_eq!((told.num_continued, told.num_points), (1, 100));
    assert_eq!(server.run("").metrics.len(), 2600);
    let changed = Record { params: BTreeMap::from([("key0000".to_owned(), "other".to_owned())]), ..record(1) };
    let error = export(&client, "e", "r", &[changed]).unwrap_err().to_string();
    assert!(error.contains("status 400") && error.contains("Changing param values"), "{error}");
}
