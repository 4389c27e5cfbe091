// The API reference, rendered from openapi.json without third-party scripts, so that it works offline.

const docs = document.getElementById("docs");

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

/** Paragraphs of text in which `ticks` mark code. */
function prose(text) {
  return text.split(/\n\s*\n/).map((paragraph) => {
    const parts = paragraph.split("`").map((part, index) => (index % 2 ? element("code", part) : part));
    return element("p", "", ...parts);
  });
}

function resolve(schema, api) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema;
}

/** A schema in a few words, such as "integer 0..10 or null". */
function inWords(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(inWords).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "array") return `list of ${inWords(schema.items)}`;
  const low = schema.minimum ?? (schema.exclusiveMinimum !== undefined ? `>${schema.exclusiveMinimum}` : undefined);
  // Numbers past 2^53 are not exact here, so they are not shown.
  const high = schema.maximum > Number.MAX_SAFE_INTEGER ? "2^63-1" : schema.maximum;
  const range = low !== undefined || schema.maximum !== undefined ? ` ${low ?? ""}..${high ?? ""}` : "";
  return (schema.type ?? "any") + range;
}

function fields(schema) {
  const table = element("table");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const required = schema.required?.includes(name) ? "" : "?";
    const row = element("tr", "", element("td", name + required), element("td", inWords(field)), element("td", "", ...prose(field.description ?? "")));
    table.append(row);
  }
  const scroll = element("div", "", table);
  scroll.className = "scroll";
  return scroll;
}

function operation(method, path, about, api) {
  const box = element("details", "", element("summary", "", element("b", method.toUpperCase()), element("code", path), element("span", about.summary)));
  if (about.description) box.append(...prose(about.description));
  const body = resolve(about.requestBody?.content?.["application/json"]?.schema, api);
  if (body) box.append(element("h3", "Request"), fields(body));
  for (const [status, response] of Object.entries(about.responses)) {
    const schema = response.content?.["application/json"]?.schema;
    const name = schema?.$ref?.split("/").pop();
    box.append(element("h3", `${status} ${response.description ?? ""}`));
    if (name && name !== "ErrorBody") box.append(fields(resolve(schema, api)));
    else if (name) box.append(element("p", "The error object."));
  }
  return box;
}

try {
  const api = await (await fetch("openapi.json")).json();
  const parts = [...prose(api.info.description), element("h2", "Requests")];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) parts.push(operation(method, path, about, api));
  }
  parts.push(element("h2", "The error object"), fields(api.components.schemas.ErrorDetail));
  docs.replaceChildren(...parts);
} catch {
  docs.replaceChildren(element("p", "The reference could not be loaded from openapi.json."));
}
