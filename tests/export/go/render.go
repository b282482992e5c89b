// Prompts as Ollama has them made: the types, the variables and the functions that it gives to a Go template.
//
// In, on standard input: {"template": text, "requests": [{"messages": [...], "tools": [...], "think": bool or null}]},
// messages and tools as in Ollama's /api/chat. Out: a JSON list of prompts. Nothing but the standard library.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"time"
)

type property struct {
	AnyOf       []property     `json:"anyOf,omitempty"`
	Type        kinds          `json:"type,omitempty"`
	Items       any            `json:"items,omitempty"`
	Description string         `json:"description,omitempty"`
	Enum        []any          `json:"enum,omitempty"`
	Properties  map[string]any `json:"properties,omitempty"`
	Required    []string       `json:"required,omitempty"`
}

// One kind is written as text, several as a list.
type kinds []string

func (k *kinds) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*k = kinds{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(k))
}

func (k kinds) MarshalJSON() ([]byte, error) {
	if len(k) == 1 {
		return json.Marshal(k[0])
	}
	return json.Marshal([]string(k))
}

type tool struct {
	Type     string `json:"type"`
	Items    any    `json:"items,omitempty"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string              `json:"type"`
			Defs       any                 `json:"$defs,omitempty"`
			Items      any                 `json:"items,omitempty"`
			Required   []string            `json:"required,omitempty"`
			Properties map[string]property `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type call struct {
	ID       string `json:"id"`
	Function struct {
		Index     int            `json:"index"`
		Name      string         `json:"name"`
		Arguments map[string]any `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role       string `json:"role"`
	Content    string `json:"content"`
	Thinking   string `json:"thinking"`
	ToolCalls  []call `json:"tool_calls"`
	ToolName   string `json:"tool_name"`
	ToolCallID string `json:"tool_call_id"`
}

type request struct {
	Messages []*message `json:"messages"`
	Tools    []tool     `json:"tools"`
	Think    *bool      `json:"think"`
}

// Messages in a row of one role become one, but results of tools; system texts are also given apart.
func joined(messages []*message) (string, []*message) {
	var system []string
	var found []*message
	for _, m := range messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(found); n > 0 && m.Role != "tool" && found[n-1].Role == m.Role {
			found[n-1].Content += "\n\n" + m.Content
		} else {
			found = append(found, m)
		}
	}
	return strings.Join(system, "\n\n"), found
}

func main() {
	var given struct {
		Template string    `json:"template"`
		Requests []request `json:"requests"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	functions := template.FuncMap{
		"json": func(v any) string {
			text, _ := json.Marshal(v)
			return string(text)
		},
		"currentDate": func(...string) string { return time.Now().Format("2006-01-02") },
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(given.Template))
	prompts := []string{}
	for k, asked := range given.Requests {
		system, messages := joined(asked.Messages)
		var out strings.Builder
		err := parsed.Execute(&out, map[string]any{
			"System":     system,
			"Messages":   messages,
			"Tools":      asked.Tools,
			"Response":   "",
			"Think":      asked.Think != nil && *asked.Think,
			"ThinkLevel": "",
			"IsThinkSet": asked.Think != nil,
		})
		if err != nil {
			panic(fmt.Sprintf("request %d: %v", k, err))
		}
		prompts = append(prompts, out.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(prompts); err != nil {
		panic(err)
	}
}
